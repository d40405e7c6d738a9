"""``fmeta train``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fmeta.meta_train import TrainConfig, train_on_digits

__all__ = ["run_train"]


def run_train(config: TrainConfig) -> int:
    """Meta-trains and compares; gives the exit status."""
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
