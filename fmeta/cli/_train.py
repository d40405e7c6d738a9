"""``fmeta train``."""

from __future__ import annotations

import dataclasses
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fmeta.cli._progress import progress_of, value_of
from fmeta.cli._resuming import how_to_resume, is_shown_rank, processes, resume_command
from fmeta.distributed import RankLost, joined
from fmeta.evaluate import Evaluation
from fmeta.meta_train import TrainConfig, read_config, train_on_digits

__all__ = ["run_train", "train_command"]

OnStep = Callable[[dict[str, Any]], None]
_FEW = 32  # processes up to which evolution strategies exchange scalars


def train_command(arguments: Sequence[str]) -> Callable[..., int]:
    """The function that tyro turns into ``fmeta train``, with the defaults that hold here.

    Args:
        arguments: of the command line, ``train`` first; ``--config FILE`` and, with ``--resume``,
            the run in OUT/NAME give the defaults that the other flags override. An error in these
            files is raised when the command is called.
    """
    default, error = TrainConfig(), None
    try:
        default = _defaults(arguments)
    except (ValueError, OSError) as found:
        error = found

    # tyro reads the annotations, so that their names must be global ones of this module.
    def train(
        settings: TrainConfig = default,
        config: Annotated[
            str | None,
            tyro.conf.arg(
                metavar="FILE",
                help="Take defaults from a JSON file: the config.json of a run, or a part of one.",
            ),
        ] = None,
    ) -> int:
        if error is not None:
            raise error
        return run_train(settings)

    train.__doc__ = (
        f"{TrainConfig.__doc__}\n\nWrites OUT/NAME/ with curves.png, results.json, "
        "weights.safetensors, config.json, metrics.jsonl and checkpoint/. A run that was stopped "
        "or killed goes on with --resume, which needs no other flag than its --out and --name."
    )
    return train


def run_train(config: TrainConfig) -> int:
    """Meta-trains and compares; gives the exit status."""
    from rich.console import Console

    console = Console()
    shows = is_shown_rank()
    try:
        checked = config.checked()
    except ValueError:
        if shows:
            raise
        return 1
    torch.set_num_threads(1)  # these models are small: two take as long, and twice the CPU time
    try:
        # To draw all perturbations on each rank costs more than it saves where ranks are many.
        redraws = processes() <= _FEW
        progress = progress_of(console, checked.num_steps, shows)
        with joined(redraws=redraws) as ranks, progress as (on_step, on_phase):
            results = train_on_digits(config, on_step=on_step, on_phase=on_phase, ranks=ranks)
    except KeyboardInterrupt:
        if shows:
            why = "stopped, by hand or because another process ended (torchrun names it); "
            _complain((why if processes() > 1 else "") + how_to_resume("train", config))
        return 130
    except RankLost as lost:
        if lost.is_told_here:
            _complain(f"{lost}; {how_to_resume('train', config)}")
        return 1
    except FloatingPointError:
        if shows:  # all ranks find it
            raise
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(f"{error}; free some space, then: {resume_command('train', config)}")
        return 1
    except ImportError as error:  # an extra that is not installed
        _complain(str(error))
        return 1
    if not shows:
        return 0
    _show(console, results)
    console.print(f"everything is in {config.out}/{config.name}/ (figure: curves.png)")
    return 0


def _defaults(arguments: Sequence[str]) -> TrainConfig:
    default = TrainConfig()
    if not arguments or arguments[0] != "train":
        return default  # another command, with options of its own
    file = value_of("--config", arguments)
    if file is not None:
        default = read_config(file, default)
    if file is not None and "--resume" in arguments:
        raise ValueError(
            "--config and --resume exclude each other: a run goes on with the settings that it "
            "was started with"
        )
    if "--resume" in arguments:
        out = value_of("--out", arguments) or default.out
        name = value_of("--name", arguments) or default.name
        stored = Path(out) / name / "config.json"
        if stored.exists():
            # The folder may have been moved since.
            default = dataclasses.replace(read_config(stored, default), out=out, name=name)
    return default


def _complain(text: str) -> None:
    sys.stderr.write(f"fmeta: {text}\n")


def _show(console: Any, results: dict[str, Any]) -> None:
    for name, value in results["evaluations"].items():
        console.print(Evaluation.from_dict(value).table(f"{results['title']}, {name}"))
