"""``fmeta plot``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from fmeta import _files, evaluate, plot

__all__ = ["PlotConfig", "run_plot"]


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    """Redraws the figures of runs and evaluations from their files.

    curves.png comes from results.json, meta_training.png from metrics.jsonl; a folder needs one of
    them. Of several folders the first evaluation of each is drawn side by side, and the courses of
    meta-training into the same axes.
    """

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs or of evaluations."""
    out: str | None = None
    """Folder for the figures; None: the folder of the run, or for several the current one."""


def run_plot(config: PlotConfig) -> int:
    """Draws and tells where; gives the exit status."""
    from rich.console import Console

    if not config.runs:
        raise ValueError("give at least one folder of a run")
    folders = {path: Path(path) for path in config.runs}
    results, metrics = {}, {}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {name}")
        if (folder / "results.json").exists():
            results[name] = evaluate.load(folder / "results.json")
        rows = _rows(folder / "metrics.jsonl")
        if rows:
            metrics[name] = rows
        if name not in results and name not in metrics:
            raise FileNotFoundError(
                f"{name} holds neither results.json nor metrics.jsonl: there is nothing to draw"
            )
    alone = len(folders) == 1
    default = config.runs[0] if alone else "."
    out = _files.writable_folder(default if config.out is None else config.out)
    written = []
    if results:
        _draw_results(out / "curves.png", results)
        written.append(out / "curves.png")
    if metrics:
        title = f"Meta-training, {config.runs[0]}" if alone else "Meta-training"
        plot.meta_training(out / "meta_training.png", metrics, title=title)
        written.append(out / "meta_training.png")
    Console().print(f"written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)
    return 0


def _draw_results(path: Path, results: dict[str, evaluate.Results]) -> None:
    if len(results) == 1:
        (found,) = results.values()
        plot.evaluations(path, found.evaluations, title=found.title, mark=found.mark)
        return
    firsts = {name: next(iter(r.evaluations.values())) for name, r in results.items()}
    titles = {r.title for r in results.values()}
    title = titles.pop() if len(titles) == 1 else "Evaluations"
    marks = {r.mark for r in results.values()}
    mark = marks.pop() if len(marks) == 1 else None
    plot.evaluations(path, firsts, title=title, mark=mark, training=False)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``; none when there is no such file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    # A process that was killed may have left the beginning of a line.
    for i, line in enumerate(lines[:-1]):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path}, line {i + 1} is no metrics of an outer step: {line[:60]!r}")
        rows.append(row)
    return rows
