"""Figures of any loss curves."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from fmeta.plot._figure import write

__all__ = ["curves"]


def curves(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Tensor]],
    *,
    title: str,
    mark: tuple[int, str] | None = None,
) -> None:
    """Draws loss curves, one panel beside the other, and writes the figure atomically.

    Args:
        path: a ``.png`` file.
        panels: panel title -> curve name -> losses ``(seeds, steps)``; the line is the mean over
            seeds, the band reaches from the lowest to the highest seed.
        title: above all panels.
        mark: ``(step, text)`` of a vertical line, such as the horizon of meta-training.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(5.6 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for i, (label, losses) in enumerate(lines.items()):
            steps = range(1, losses.shape[1] + 1)
            axis.plot(steps, losses.mean(0), label=label, color=f"C{i}", lw=1.6)
            low, high = losses.min(0).values, losses.max(0).values
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, lw=0)
        if mark is not None:
            axis.axvline(mark[0], color="0.5", lw=1, ls="--", label=mark[1])
        axis.set(title=name, xlabel="step", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("loss (mean; band: all seeds)")
    axes[-1].legend(fontsize=8)
    figure.suptitle(title)
    write(path, figure)
