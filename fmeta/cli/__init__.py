"""The command line: ``fmeta train``, ``fewshot``, ``evaluate``, ``plot``, ``optimizers``."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fmeta.cli._evaluate import EvaluateConfig, run_evaluate
from fmeta.cli._fewshot import fewshot_command
from fmeta.cli._optimizers import OptimizersConfig, run_optimizers
from fmeta.cli._plot import PlotConfig, run_plot
from fmeta.cli._resuming import is_shown_rank
from fmeta.cli._train import train_command

__all__ = ["main"]

# Shown at the end of each command's --help.
_EXAMPLES = {
    "train": (
        "fmeta train                                meta-train on digits, evaluate, draw",
        "fmeta train --smoke --name try             the same in seconds, to see that it runs",
        "fmeta train --resume                       go on with a run that was stopped",
        "torchrun --nproc-per-node 2 -m fmeta train the same by two processes",
    ),
    "fewshot": (
        "fmeta fewshot --learner maml --task glyphs --ways 5 --shots 1",
        "fmeta fewshot --learner reptile --task sinusoid --name waves",
        "fmeta fewshot --task omniglot --download --name omniglot",
        "fmeta fewshot --resume                     go on with a run that was stopped",
    ),
    "evaluate": (
        "fmeta evaluate runs/digits                 on MLPs of a width not met in meta-training",
        "fmeta evaluate runs/digits --model cnn --widths 8 16",
        "fmeta evaluate runs/digits --num-steps 200 1000 --baselines adam muon_cosine",
        "fmeta evaluate weights.safetensors --num-seeds 30 --out comparison",
    ),
    "plot": (
        "fmeta plot runs/digits                     curves.png and meta_training.png of a run",
        "fmeta plot runs/a runs/b --out figures     two runs side by side",
    ),
    "optimizers": (
        "fmeta optimizers                           all rules, a line each",
        "fmeta optimizers adafactor_mlp             all about one",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows ``fmeta``; default: those of the process.

    Returns:
        Exit status: 0 done, 1 an error (its message is on standard error), 2 arguments that make
        no sense, 130 interrupted.
    """

    given = sys.argv[1:] if arguments is None else arguments

    def evaluate(config: EvaluateConfig) -> int:
        """Compares a learned optimizer with its untrained start and tuned baselines."""
        return run_evaluate(config)

    def plot(config: PlotConfig) -> int:
        """Redraws the figures of runs, or draws several side by side."""
        return run_plot(config)

    def optimizers(config: OptimizersConfig) -> int:
        """Lists all optimizers: paper, number of learned numbers, bytes of state, needs."""
        return run_optimizers(config)

    commands: dict[str, Callable[..., Any]] = {
        "train": train_command(given),
        "fewshot": fewshot_command(given),
        "evaluate": evaluate,
        "plot": plot,
        "optimizers": optimizers,
    }
    with _terminates_like_interrupt():
        return _run(commands, given)


def _run(commands: dict[str, Callable[..., Any]], given: list[str]) -> int:
    import tyro

    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="fmeta",
            description="Learned optimizers and meta-learning on torch.",
            args=given,
            config=(tyro.conf.OmitArgPrefixes,),
            console_outputs=is_shown_rank(),
        )
    except SystemExit as exit:
        examples = _EXAMPLES.get(given[0], ()) if given and not exit.code else ()
        if examples and is_shown_rank():
            sys.stdout.write("\n".join(("examples:", *(f"  {line}" for line in examples))) + "\n")
        raise
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        _complain(str(error))
        return 1


@contextmanager
def _terminates_like_interrupt() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: the last complete state is saved."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(text: str) -> None:
    sys.stderr.write(f"fmeta: {text}\n")
