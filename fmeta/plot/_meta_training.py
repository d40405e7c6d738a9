"""Figures of meta-training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fmeta.plot._figure import PALETTE, grid_of_axes, log_scale, write

__all__ = ["meta_training"]

# Key in the metrics: title of its panel.
_PANELS = {
    "meta_loss": "meta-loss",
    "meta_grad_norm": "norm of the meta-gradient",
    "signal_to_noise": "signal-to-noise of the meta-gradient",
    "diverged": "share of diverged tasks",
}


def meta_training(
    path: str | os.PathLike[str], runs: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str
) -> None:
    """Draws how meta-training went, and writes the figure atomically.

    Panels: meta-loss with the validation loss, the meta-gradient's norm, and what else was recorded
    of its signal-to-noise and the share of diverged tasks.

    Args:
        path: a ``.png`` file.
        runs: by name, the rows of ``metrics.jsonl``: dicts with ``step`` and metrics.
        title: above all panels.

    Raises:
        ValueError: when no run has a row.
    """
    rows = [row for run in runs.values() for row in run]
    if not rows:
        raise ValueError("there are no metrics to draw: the run has made no outer step yet")
    panels = [k for k in _PANELS if any(k in row for row in rows)]
    figure, axes = grid_of_axes(len(panels), height=3.2)
    for axis, key in zip(axes, panels, strict=True):
        for i, (name, run) in enumerate(runs.items()):
            color = PALETTE[i % len(PALETTE)]
            steps, values = _points(run, key)
            noisy = key != "diverged" and len(values) > 40
            axis.plot(steps, values, color=color, lw=0.7, alpha=0.35 if noisy else 1.0)
            if noisy:
                axis.plot(steps, _smooth(values), color=color, lw=1.8, label=name)
            else:
                axis.lines[-1].set(lw=1.8, label=name)
            if key == "meta_loss":
                at, validation = _points(run, "validation")
                if at:
                    axis.plot(at, validation, "o--", color=color, ms=3, lw=1, mfc="white")
        axis.set_title(_PANELS[key], fontsize=10, loc="left")
        axis.set_xlabel("outer step")
        if key in ("meta_loss", "meta_grad_norm") and _positive(rows, key):
            log_scale(axis, "y")
        if key == "diverged":
            axis.set_ylim(-0.02, 1.02)
    _legend(figure, axes[0], runs, any("validation" in row for row in rows))
    figure.suptitle(title, fontsize=11)
    write(path, figure)


def _legend(figure: Any, axis: Any, runs: Mapping[str, Any], validated: bool) -> None:
    from matplotlib.lines import Line2D

    handles = axis.get_legend_handles_labels()[0]
    if len(runs) == 1:
        handles[0].set_label("training tasks (mean of the steps around)")
    if validated:
        label = "validation tasks"
        handles.append(
            Line2D([], [], marker="o", ls="--", ms=3, mfc="white", color="0.3", label=label)
        )
    if len(runs) > 1 or validated:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def _points(run: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(row["step"] + 1, row[key]) for row in run if row.get(key) is not None]
    return [s for s, _ in pairs], [float(v) for _, v in pairs]


def _positive(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return all(v > 0 for v in values if math.isfinite(v))


def _smooth(values: list[float]) -> list[float]:
    """Mean of the finite values within a fortieth of the length to both sides."""
    half = max(1, len(values) // 40)
    out = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out
