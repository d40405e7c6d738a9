"""What commands that take long show on the way, and what they read before the parser does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fmeta.meta_train import describe_diverged

__all__ = ["progress_of", "value_of"]

OnStep = Callable[[dict[str, Any]], None]


@contextmanager
def progress_of(
    console: Any, total: int, shows: bool = True
) -> Iterator[tuple[OnStep, Callable[[str], None]]]:
    """A bar on a terminal, plain lines (about ten) elsewhere."""
    notices = _Notices()
    if not shows:
        yield lambda metrics: None, lambda text: None
        return
    if not console.is_terminal:
        every = max(1, total // 10)

        def say(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        def on_step(metrics: dict[str, Any]) -> None:
            step = metrics["step"]
            for text in notices.of(metrics):
                say(text)
            if step % every == 0 or step == total - 1:
                say(f"outer step {step} of {total}: {notices.describe(metrics)}")

        yield on_step, say
        return
    from rich import progress as rich
    from rich.table import Column

    whole = Column(no_wrap=True)  # in a narrow terminal the text is what wraps
    columns = (
        rich.BarColumn(bar_width=12, table_column=whole),
        rich.MofNCompleteColumn(table_column=whole),
        rich.TimeElapsedColumn(table_column=whole),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(table_column=whole),
        rich.TextColumn("{task.description}", markup=False, table_column=Column()),
    )
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)

        def say(text: str) -> None:
            bar.console.print(text, highlight=False, markup=False)

        def on_step(metrics: dict[str, Any]) -> None:
            for text in notices.of(metrics):
                say(text)
            bar.update(task, completed=metrics["step"] + 1, description=notices.describe(metrics))

        yield on_step, say


class _Notices:
    """What is told of outer steps: numbers of each, and the first few that were out of the way."""

    most = 5

    def __init__(self) -> None:
        self.validation, self.told = "", 0

    def describe(self, metrics: Mapping[str, Any]) -> str:
        if "validation" in metrics:
            self.validation = f", validation {metrics['validation']:.4f}"
        loss, norm = metrics["meta_loss"], metrics["meta_grad_norm"]
        diverged = f", diverged {metrics['diverged']:.0%}" if metrics.get("diverged") else ""
        return f"meta-loss {loss:.4f}, meta-gradient {norm:.3f}{self.validation}{diverged}"

    def of(self, metrics: Mapping[str, Any]) -> list[str]:
        texts = [describe_diverged(metrics)]
        if "skipped" in metrics:
            texts.append(f"outer step {metrics['step']}: nothing finite to learn from, skipped")
        texts = [text for text in texts if text]
        self.told += bool(texts)
        if self.told == self.most and texts:
            texts.append("further ones are in metrics.jsonl")
        return texts if self.told <= self.most else []


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    value = None
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
    return value
