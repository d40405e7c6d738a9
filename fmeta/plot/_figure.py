"""What all figures share: colours, readable log axes, a file written whole."""

from __future__ import annotations

import math
import os
from io import BytesIO
from pathlib import Path
from typing import Any

from fmeta import _files

__all__ = ["AXIS_WIDTH", "INK", "MUTED", "PALETTE", "grid_of_axes", "log_scale", "write"]

# Okabe and Ito's colours, which the colour-blind tell apart; the first two are furthest apart.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED = "#000000", "#999999"
AXIS_WIDTH = 4.6


def grid_of_axes(panels: int, *, height: float = 3.7) -> tuple[Any, list[Any]]:
    """A figure and its axes: one row of up to three, or rows of two when there are four."""
    from matplotlib.figure import Figure  # slow to import

    columns = 2 if panels == 4 else min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(AXIS_WIDTH * columns, height * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, which="major", lw=0.6)
    return figure, axes[:panels]


def log_scale(axis: Any, which: str) -> None:
    """A log axis with plain numbers at 1, 2 and 5 times the powers of ten.

    Where few of these are in sight, at even distances.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    side = axis.xaxis if which == "x" else axis.yaxis
    low, high = sorted(axis.get_xlim() if which == "x" else axis.get_ylim())
    decades = math.log10(high / low) if low > 0 else 1.0
    if decades < 0.9:
        side.set_major_locator(MaxNLocator(5))
    else:
        side.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))


def write(path: str | os.PathLike[str], figure: Any) -> None:
    """Writes the figure as PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    _files.write_bytes(Path(path), buffer.getvalue())
