"""Horizons: how many inner steps each training is given, drawn as it begins."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fmeta._functions import check_function
from fmeta._numbers import is_whole
from fmeta.estimators._contract import check_sizes

__all__ = ["Horizon", "as_horizon", "constant", "growing", "log_uniform"]

# schedule(generator, estimate) -> inner steps of a training that begins in this estimate.
Horizon = Callable[[torch.Generator, int], int]


def constant(num_steps: int) -> Horizon:
    """Every training has ``num_steps`` inner steps, as with the number alone.

    Raises:
        ValueError: below 1, or no integer.
    """
    return _Constant(num_steps)


def log_uniform(low: int, high: int) -> Horizon:
    """Horizons whose logarithm is uniform from ``low`` to ``high`` (both may occur).

    Short trainings are as many in each doubling as long ones, and so get far less of the steps.
    A horizon of n has probability ``log((n + 1) / n) / log((high + 1) / low)``.

    Args:
        low, high: fewest and most inner steps, ``1 <= low <= high``.

    Raises:
        ValueError: for other numbers.

    Example:
        >>> from fmeta.random import fold_in
        >>> schedule = log_uniform(10, 1000)
        >>> all(10 <= schedule(fold_in(0, i), 0) <= 1000 for i in range(100))
        True
    """
    return _LogUniform(low, high)


def growing(start: int, end: int, num_steps: int) -> Horizon:
    """Horizons that grow evenly from ``start`` to ``end`` over ``num_steps`` estimates.

    Trainings that begin in estimate k have ``round(start + (end - start) min(1, k / num_steps))``
    inner steps; one that has begun keeps its horizon.

    Args:
        start, end: inner steps at first and at last (fewer at last is allowed).
        num_steps: estimates from the first to the last.

    Raises:
        ValueError: numbers below 1, or no integers.

    Example:
        >>> schedule = growing(10, 110, num_steps=50)
        >>> [schedule(None, k) for k in (0, 25, 50, 1000)]
        [10, 60, 110, 110]
    """
    return _Growing(start, end, num_steps)


def as_horizon(horizon: int | Sequence[int] | Horizon) -> Horizon:
    """The schedule that ``horizon`` stands for: a number, several to choose from, or a schedule.

    A schedule of your own is called as these are, ``schedule(generator, estimate)``, with a
    generator that belongs to the training, and must return a positive integer.

    Raises:
        ValueError: for numbers below 1, none at all, or anything else.
    """
    if isinstance(horizon, numbers.Integral):
        return _Constant(horizon if isinstance(horizon, bool) else int(horizon))
    if callable(horizon):
        return _Checked(horizon)
    if not isinstance(horizon, Sequence) or isinstance(horizon, str):
        raise ValueError(
            "horizon must be a number of inner steps, several, or a schedule as "
            f"fmeta.estimators.log_uniform(100, 1000), got {horizon!r}"
        )
    if not horizon:
        raise ValueError("horizon is empty: give a number of inner steps, or several")
    return _Choice(tuple(horizon))


@dataclass(frozen=True)
class _Constant:
    num_steps: int

    def __post_init__(self) -> None:
        check_sizes(horizon=self.num_steps)

    def __call__(self, generator: torch.Generator, estimate: int) -> int:
        return self.num_steps


@dataclass(frozen=True)
class _Choice:
    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        for number in self.numbers:
            check_sizes(horizon=number)

    def __call__(self, generator: torch.Generator, estimate: int) -> int:
        return int(self.numbers[int(torch.randint(len(self.numbers), (), generator=generator))])


@dataclass(frozen=True)
class _LogUniform:
    low: int
    high: int

    def __post_init__(self) -> None:
        check_sizes(low=self.low, high=self.high)
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")

    def __call__(self, generator: torch.Generator, estimate: int) -> int:
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
        # Rounded down, so that up to high + 1: every number then has its share.
        drawn = self.low * math.exp(u * math.log((self.high + 1) / self.low))
        return min(self.high, int(drawn))


@dataclass(frozen=True)
class _Growing:
    start: int
    end: int
    num_steps: int

    def __post_init__(self) -> None:
        check_sizes(start=self.start, end=self.end, num_steps=self.num_steps)

    def __call__(self, generator: torch.Generator, estimate: int) -> int:
        return round(self.start + (self.end - self.start) * min(1.0, estimate / self.num_steps))


@dataclass(frozen=True)
class _Checked:
    schedule: Any

    def __post_init__(self) -> None:
        check_function("horizon", self.schedule, "generator", "estimate")

    def __call__(self, generator: torch.Generator, estimate: int) -> int:
        drawn = self.schedule(generator, estimate)
        if not is_whole(drawn) or drawn < 1:
            raise ValueError(
                f"the schedule of horizons returned {drawn!r} in estimate {estimate}: it must "
                "return a positive integer, a number of inner steps"
            )
        return int(drawn)
