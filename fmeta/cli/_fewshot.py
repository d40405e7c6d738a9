"""``fmeta fewshot``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fmeta.cli._progress import progress_of, value_of
from fmeta.cli._resuming import how_to_resume, is_shown_rank, processes
from fmeta.distributed import RankLost, joined
from fmeta.fewshot import FewShotConfig, few_shot
from fmeta.meta_train import read_config

__all__ = ["fewshot_command", "run_fewshot"]


def fewshot_command(arguments: Sequence[str]) -> Callable[..., int]:
    """The function that tyro turns into ``fmeta fewshot``; ``--resume`` takes the run's settings.

    Args:
        arguments: of the command line, ``fewshot`` first.
    """
    default, error = FewShotConfig(), None
    try:
        if arguments and arguments[0] == "fewshot" and "--resume" in arguments:
            out = value_of("--out", arguments) or default.out
            name = value_of("--name", arguments) or default.name
            stored = Path(out) / name / "config.json"
            if stored.exists():
                default = dataclasses.replace(read_config(stored, default), out=out, name=name)
    except (ValueError, OSError) as found:
        error = found

    def fewshot(settings: FewShotConfig = default) -> int:
        if error is not None:
            raise error
        return run_fewshot(settings)

    fewshot.__doc__ = (
        f"{FewShotConfig.__doc__}\n\nWrites OUT/NAME/ with episodes.png, adaptation.png, "
        "glyphs.png (a contact sheet, of glyphs), results.json, weights.safetensors, config.json, "
        "metrics.jsonl and checkpoint/. A run that was stopped or killed goes on with --resume, "
        "and its --out and --name."
    )
    return fewshot


def run_fewshot(config: FewShotConfig) -> int:
    """Meta-trains and tests; gives the exit status."""
    from rich.console import Console

    console = Console()
    shows = is_shown_rank()
    try:
        checked = config.checked()
    except ValueError:
        if shows:
            raise
        return 1
    if checked.task == "sinusoid":  # of small networks: two threads take as long as one
        torch.set_num_threads(1)
    try:
        progress = progress_of(console, checked.outer_steps, shows)
        with joined() as ranks, progress as (on_step, on_phase):
            results = few_shot(config, on_step=on_step, on_phase=on_phase, ranks=ranks)
    except KeyboardInterrupt:
        if shows:
            why = "stopped, by hand or because another process ended (torchrun names it); "
            _complain((why if processes() > 1 else "") + how_to_resume("fewshot", config))
        return 130
    except RankLost as lost:
        if lost.is_told_here:
            _complain(f"{lost}; {how_to_resume('fewshot', config)}")
        return 1
    except ImportError as error:  # an extra that is not installed
        _complain(str(error))
        return 1
    if not shows:
        return 0
    _show(console, results)
    console.print(
        f"everything is in {config.out}/{config.name}/ (figures: episodes.png, adaptation.png)"
    )
    return 0


def _complain(text: str) -> None:
    sys.stderr.write(f"fmeta: {text}\n")


def _show(console: Any, results: dict[str, Any]) -> None:
    from rich.table import Table

    task = results["task"]
    what = f"{task['ways']}-way {task['shots']}-shot"
    if not task["ways"]:
        what = f"{task['shots']} point{'s' * (task['shots'] != 1)}"
    count = results["episodes"]
    title = f"{task['name']}, {what}: {count} test episode{'s' * (count != 1)}"
    if task["ways"]:
        title += f", normalisation {results['batch_norm']}"
    if not results.get("validated", True):
        title += ", the last meta-parameters (there is no validation split)"
    table = Table(title=title)
    table.add_column("learner")
    table.add_column(f"{results['measure']} (95 % interval)", justify="right")
    scale, unit = (100, " %") if results["measure"] == "accuracy" else (1, "")
    best_first = sorted(
        results["scores"].items(),
        key=lambda item: item[1]["mean"] * (-1 if unit else 1),
    )
    for name, found in best_first:
        mean, half = scale * found["mean"], scale * found["half_interval"]
        table.add_row(name, f"{mean:.3g} ± {half:.2g}{unit}")
    console.print(table)
