"""The command line: ``fmeta train``, ``fmeta optimizers``."""

from __future__ import annotations

import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fmeta.meta_train import TrainConfig, train_on_digits

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
        return _train(config)

    def optimizers() -> int:
        """Lists all optimizers by name."""
        return _optimizers()

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


def _optimizers() -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fmeta.optimizers import BUILDERS

    table = Table("name", "arguments", "what it is")
    for name, builder in BUILDERS.items():
        parameters = inspect.signature(builder).parameters.values()
        arguments = ", ".join(str(p).split(":")[0] + _default(p) for p in parameters)
        table.add_row(name, arguments, escape((inspect.getdoc(builder) or "").splitlines()[0]))
    Console().print(table)
    return 0


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f"={parameter.default!r}"


def _train(config: TrainConfig) -> int:
    from rich.console import Console

    console = Console()
    checked = config.checked()
    torch.set_num_threads(checked.threads)
    with _progress(console, checked.num_steps) as (on_step, on_phase):
        results = train_on_digits(config, on_step=on_step, on_phase=on_phase)
    _show(console, results)
    console.print(f"everything is in {config.out}/{config.name}/ (figure: curves.png)")
    return 0


@contextmanager
def _progress(
    console: Any, total: int
) -> Iterator[tuple[Callable[[dict[str, float]], None], Callable[[str], None]]]:
    """A bar on a terminal, plain lines (about ten) elsewhere."""
    if not console.is_terminal:
        every = max(1, total // 10)

        def on_step(metrics: dict[str, float]) -> None:
            step = int(metrics["step"])
            if step % every == 0 or step == total - 1:
                console.print(f"outer step {step}: {_describe(metrics)}", highlight=False)

        yield on_step, lambda text: console.print(text, highlight=False)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield (
            lambda m: progress.update(task, completed=m["step"] + 1, description=_describe(m)),
            lambda text: progress.console.print(text, highlight=False),
        )


def _describe(metrics: dict[str, float]) -> str:
    text = f"meta-loss {metrics['meta_loss']:.4f}, meta-gradient {metrics['meta_grad_norm']:.3f}"
    return text + (f", validation {metrics['validation']:.4f}" if "validation" in metrics else "")


def _show(console: Any, results: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        "optimizer",
        "training",
        "held out",
        "learned - this [95 %]",
        title="final losses (mean of the last tenth of the steps, fresh seeds)",
        caption="learned - this: paired difference of held-out losses over the seeds",
    )
    paired = results["held_out_loss_minus"]
    for name, row in results["table"].items():
        d = paired.get(name)
        table.add_row(
            name,
            f"{row['final_train_loss']:.4f}",
            f"{row['final_held_out_loss']:.4f}",
            f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" if d else "",
        )
    console.print(table)
    for name, row in results["table"].items():
        if row["diverged_seeds"]:
            console.print(f"{name}: {row['diverged_seeds']} seeds diverged", highlight=False)
