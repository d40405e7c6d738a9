"""Figures of evaluations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from fmeta.evaluate import Band, Evaluation
from fmeta.plot._figure import INK, MUTED, PALETTE, grid_of_axes, log_scale, write

__all__ = ["evaluations"]


class _Style(NamedTuple):
    """How one optimizer is drawn in all panels; a minor one has neither band nor name."""

    label: str
    color: str
    line: str
    major: bool


def evaluations(
    path: str | os.PathLike[str],
    found: Mapping[str, Evaluation],
    *,
    title: str,
    mark: tuple[int, str] | None = None,
    training: bool = True,
) -> None:
    """Draws loss curves, mean and range over seeds on log axes, and writes the figure atomically.

    Of the first evaluation there are two panels, training and held-out loss; of each further one
    (longer horizons, other models) the held-out loss. The contenders, the reference and the best
    baseline are coloured; the other baselines stay grey.

    Args:
        path: a ``.png`` file.
        found: `fmeta.evaluate.Evaluation` by title.
        title: above all panels.
        mark: ``(step, text)`` of a vertical line, such as the horizon of meta-training.
        training: whether the first evaluation's training loss has a panel.

    Raises:
        ValueError: when there is nothing to draw.
    """
    if not found:
        raise ValueError("there are no evaluations to draw")
    name, first = next(iter(found.items()))
    panels = [(f"{name}: training", first, "train")] if training else []
    panels += [(f"{each}: held out", e, "held_out") for each, e in found.items()]
    styles = _styles(found)
    figure, axes = grid_of_axes(len(panels))
    for axis, (label, evaluation, quantity) in zip(axes, panels, strict=True):
        _draw(axis, evaluation, quantity, styles)
        several = len({e.num_seeds for e in found.values()}) > 1
        seeds_here = f" ({evaluation.num_seeds} seeds)" if several else ""
        axis.set_title(f"{label}{seeds_here}", fontsize=10, loc="left")
        if mark is not None and mark[0] < evaluation.num_steps:
            _mark(axis, *mark)
    _legend(figure, styles)
    seeds = sorted({e.num_seeds for e in found.values()}, reverse=True)
    counts = " or ".join(map(str, seeds))
    figure.suptitle(
        f"{title}\nlines: mean of {counts} seeds; bands: lowest to highest", fontsize=11
    )
    write(path, figure)


def _styles(found: Mapping[str, Evaluation]) -> dict[str, _Style]:
    """The style of each optimizer by name, in the order of the legend."""
    first = next(iter(found.values()))
    outcomes = dict(first.outcomes)
    for evaluation in found.values():
        outcomes |= {k: o for k, o in evaluation.outcomes.items() if k not in outcomes}
    contenders = [k for k, o in outcomes.items() if o.role == "contender"]
    baselines = [k for k, o in outcomes.items() if o.role == "baseline"]
    styles: dict[str, _Style] = {}
    for i, k in enumerate(contenders):
        color = PALETTE[0] if i < 2 else PALETTE[(i - 1) % len(PALETTE)]
        styles[k] = _Style(outcomes[k].label, color, "-" if i != 1 else "--", True)
    if first.reference in baselines:
        styles[first.reference] = _Style(
            f"{outcomes[first.reference].label}, tuned", INK, "-", True
        )
    rest = [k for k in baselines if k not in styles]
    ends = {k: float(outcomes[k].held_out_loss.mean()) for k in rest}
    best = min(rest, key=ends.__getitem__, default=None)
    for k in sorted(rest, key=lambda k: k != best):
        is_best = k == best
        named = is_best or len(rest) == 2
        label = f"{outcomes[k].label}, tuned" if named else "other tuned baselines"
        styles[k] = _Style(label, PALETTE[1] if is_best else MUTED, "-", is_best)
    return styles


def _draw(axis: Any, evaluation: Evaluation, quantity: str, styles: Mapping[str, _Style]) -> None:
    top, bottom = -math.inf, math.inf
    # What matters comes last, on top.
    names = sorted(evaluation.outcomes, key=lambda k: (styles[k].major, -list(styles).index(k)))
    for k in names:
        style = styles[k]
        curve: Band = getattr(evaluation.outcomes[k], quantity)
        width = 2.0 if style.major else 0.8
        axis.plot(curve.steps, curve.mean, color=style.color, ls=style.line, lw=width)
        if style.major:
            axis.fill_between(
                curve.steps, curve.low, curve.high, color=style.color, alpha=0.14, lw=0
            )
        finite = curve.mean[curve.mean.isfinite() & (curve.mean > 0)]
        if len(finite):
            top = max(top, float(finite[0]))
            bottom = min(bottom, float(finite.min()))
    if bottom < top:
        # Above the first losses there is only divergence, which would flatten all the rest.
        axis.set_ylim(bottom / 1.25, top * 1.6)
    log_scale(axis, "x")
    log_scale(axis, "y")
    axis.set(xlabel="inner step", ylabel="loss")


def _legend(figure: Any, styles: Mapping[str, _Style]) -> None:
    from matplotlib.lines import Line2D

    handles = {
        s.label: Line2D([], [], color=s.color, ls=s.line, lw=2.0 if s.major else 0.8, label=s.label)
        for s in styles.values()
    }
    figure.legend(
        handles=list(handles.values()),
        loc="outside lower center",
        ncols=min(3, len(handles)),
        frameon=False,
    )


def _mark(axis: Any, step: int, text: str) -> None:
    axis.axvline(step, color=MUTED, lw=1, ls=":")
    axis.annotate(
        text,
        (step, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color="#555555",
    )
