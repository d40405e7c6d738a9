"""The command line: ``fmeta train``, ``fmeta optimizers``."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fmeta.cli._optimizers import list_optimizers
from fmeta.cli._train import run_train
from fmeta.meta_train import TrainConfig

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows ``fmeta``; default: those of the process.

    Returns:
        Exit status: 0 done, 1 an error (its message is on standard error), 2 arguments that make
        no sense, 130 interrupted.
    """

    def train(config: TrainConfig) -> int:
        return run_train(config)

    def optimizers() -> int:
        """Lists all optimizers by name."""
        return list_optimizers()

    train.__doc__ = (
        f"{TrainConfig.__doc__}\n\nWrites OUT/NAME/ with curves.png, results.json, "
        "weights.safetensors, config.json, metrics.jsonl and checkpoint/."
    )
    commands: dict[str, Callable[..., Any]] = {"train": train, "optimizers": optimizers}
    with _terminates_like_interrupt():
        return _run(commands, arguments)


def _run(commands: dict[str, Callable[..., Any]], arguments: list[str] | None) -> int:
    import tyro

    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="fmeta",
            description="Learned optimizers and meta-learning on torch.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except KeyboardInterrupt:
        _complain("interrupted; the last complete state is saved, --resume goes on from there")
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
