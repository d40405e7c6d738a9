"""Numbers over seeds: final losses, steps to a level, intervals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Difference",
    "Summary",
    "final_loss",
    "paired",
    "paired_difference",
    "steps_to_reach",
    "summarize",
]


class Summary(NamedTuple):
    """Mean over seeds with its 95 % interval, and the median.

    A seed that diverged has an infinite loss, so the mean is infinite and there is no interval
    (NaN); the median still tells how most seeds ended.
    """

    mean: float
    low: float
    high: float
    median: float


class Difference(NamedTuple):
    """A paired difference ``a - b`` over seeds: mean, its 95 % interval, share of seeds below 0.

    Where a seed diverged there is no interval (NaN).
    """

    mean: float
    low: float
    high: float
    share_below: float


def final_loss(losses: Tensor) -> Tensor:
    """Mean over the last tenth of the steps: ``(..., T) -> (...)``."""
    return losses[..., -max(1, losses.shape[-1] // 10) :].mean(-1)


def steps_to_reach(losses: Tensor, level: float) -> Tensor:
    """The least t at which `final_loss` of the first t losses is at most ``level``.

    Args:
        losses: shape ``(..., T)``.
        level: the loss to reach.

    Returns:
        Shape ``(...)``, float64; inf where it is never reached, or only after a loss that is not
        finite.

    Example:
        >>> steps_to_reach(torch.tensor([3.0, 2.0, 1.0]), 2.5)
        tensor(2., dtype=torch.float64)
    """
    steps = losses.shape[-1]
    t = torch.arange(1, steps + 1, device=losses.device)
    window = (t // 10).clamp_min(1)
    sums = torch.nn.functional.pad(losses.double().cumsum(-1), (1, 0))
    means = (sums[..., 1:] - sums[..., t - window]) / window
    first = torch.where(means <= level, t.double(), torch.inf)
    return first.amin(-1)


def summarize(values: Tensor) -> Summary:
    """`Summary` of shape ``(seeds,)``."""
    mean, low, high = _interval(values)
    return Summary(mean, low, high, _median(values))


def paired(a: Tensor, b: Tensor) -> Difference:
    """`Difference` of two quantities of shape ``(seeds,)``, the same seeds in the same order."""
    return Difference(*_interval(a - b), float((a < b).double().mean()))


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Mean of ``a - b`` over seeds with its 95 % interval by Student's t.

    Args:
        a, b: shape ``(seeds,)``, the same seeds in the same order, at least two.

    Returns:
        ``(mean, low, high)``; where a difference is not finite, NaN for the interval.

    Raises:
        ValueError: for fewer than two seeds.

    Example:
        >>> paired_difference(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))[0]
        2.0
    """
    return _interval(a - b)


def _interval(values: Tensor) -> tuple[float, float, float]:
    from scipy.stats import t  # slow to import

    values = values.double()
    n = len(values)
    if n < 2:
        raise ValueError("a paired interval needs at least two seeds")
    mean = float(values.mean())
    half = float(t.ppf(0.975, n - 1)) * float(values.std()) / n**0.5
    return mean, mean - half, mean + half


def _median(values: Tensor) -> float:
    return float(values.double().quantile(0.5)) if values.isfinite().all() else _middle(values)


def _middle(values: Tensor) -> float:
    """The upper median: `quantile` would interpolate towards infinity."""
    return float(values.double().sort().values[len(values) // 2])
