"""An evaluation as a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fmeta.evaluate._evaluation import Evaluation
from fmeta.evaluate._statistics import Difference

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["table"]


def table(evaluation: Evaluation, title: str | None = None) -> Table:
    """One row an optimizer; the last column compares the first one with each other."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    outcomes = evaluation.outcomes
    first, *_ = outcomes
    metrics = list(outcomes[first].metrics)
    counts = evaluation.reference is not None
    result = Table(
        title=title and escape(title),
        caption=escape(_caption(evaluation)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    result.add_column("optimizer", min_width=12)
    for name in ("lr", "training", "held out", *metrics, *(("steps",) if counts else ()), "ratio"):
        result.add_column(name, justify="right", no_wrap=name != "ratio")
    for name, outcome in outcomes.items():
        cells = ["" if outcome.lr is None else f"{outcome.lr:.3g}"]
        cells += [_loss(evaluation.summary(name, q).mean) for q in ("train_loss", "held_out_loss")]
        cells += [f"{evaluation.summary(name, q).mean:.4g}" for q in metrics]
        cells += [_steps(evaluation, name)] if counts else []
        ratio = evaluation.paired(first, name, "held_out_loss", log=True)
        cells.append("" if name == first else _ratio(ratio))
        result.add_row(escape(outcome.label), *cells)
    return result


def _caption(evaluation: Evaluation) -> str:
    """What the columns mean, and what must not be overlooked."""
    label = next(iter(evaluation.outcomes.values())).label
    lines = [
        f"{evaluation.num_steps} steps, means of {evaluation.num_seeds} seeds.",
        "training: loss of the last tenth of the steps. held out: loss at the end.",
        f"ratio: held-out loss of {label} to this one's, paired 95 % interval.",
    ]
    if evaluation.reference is not None:
        reference = evaluation.outcomes[evaluation.reference].label
        lines.append(f"steps: median, to {reference}'s final training loss.")
    for outcome in evaluation.outcomes.values():
        if outcome.diverged.any():
            count = int(outcome.diverged.sum())
            lines.append(f"{outcome.label}: {count} of {len(outcome.diverged)} seeds diverged.")
        if outcome.search is not None and outcome.search.at_edge:
            lines.append(f"{outcome.label}: the best learning rate lies at an edge of the grid.")
    return "\n".join(lines)


def _loss(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "diverged"


def _steps(evaluation: Evaluation, name: str) -> str:
    steps = evaluation.values(name, "steps")
    middle = evaluation.summary(name, "steps").median
    reached = int(steps.isfinite().sum())
    text = f"{middle:.0f}" if math.isfinite(middle) else "never"
    return text if reached in (0, len(steps)) else f"{text} ({reached}/{len(steps)})"


def _ratio(d: Difference) -> str:
    if not math.isfinite(d.low):
        return f"less in {d.share_below:.0%} of seeds"
    return f"{math.exp(d.mean):.3f} [{math.exp(d.low):.3f}, {math.exp(d.high):.3f}]"
