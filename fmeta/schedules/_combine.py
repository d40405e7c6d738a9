"""Schedules made of schedules: one after the other, multiplied, on another clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta.schedules._schedule import Schedule, as_schedule, check_boundaries, listed, on_device

__all__ = ["join", "product", "relative"]


def join(schedules: Sequence[Callable[..., Any]], boundaries: Sequence[Any] | Tensor) -> Schedule:
    """Schedules one after the other, each on a clock of its own.

    From ``boundaries[i - 1]`` on the i-th one is used. Its t is 0 there, and its horizon is the
    length of its piece; that of the last is what is left of ``num_steps``. Equals
    ``optax.join_schedules``.

    Args:
        schedules: at least one; plain functions of ``(t, num_steps)`` too.
        boundaries: one number less, increasing: a sequence of numbers or scalar tensors, or a
            tensor ``(k,)``, in updates. From 0 on the first schedule is never in use.

    Returns:
        A `Schedule`; it needs ``num_steps`` where its last one does.

    Raises:
        ValueError: when there is not one boundary less than schedules, or boundaries are known
            not to increase.

    Example:
        >>> from fmeta.schedules import linear, warmup
        >>> join([warmup(2), linear()], [2])(torch.arange(5), 4)
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000])
    """
    parts, boundaries = [as_schedule(s) for s in schedules], listed("boundaries", boundaries)
    if len(boundaries) != len(parts) - 1:
        raise ValueError(
            f"join takes one boundary less than schedules, got {len(boundaries)} boundaries for "
            f"{len(parts)} schedules"
        )
    check_boundaries(boundaries)

    def factor(t: Tensor, num_steps: Any) -> Tensor:
        starts = [on_device(x, t) for x in boundaries]
        lengths = [_length(a, b) for a, b in zip([0, *starts], starts, strict=False)]
        left = None if num_steps is None else num_steps - (starts[-1] if starts else 0)
        # A piece that is not in use is asked about the nearest of its ends: nothing else need have
        # a finite derivative there.
        times = [(t - a).clamp(min=0) for a in (0, *starts)]
        times[:-1] = [x.clamp(max=b) for x, b in zip(times[:-1], lengths, strict=True)]
        out, *later = (p(x, b) for p, x, b in zip(parts, times, [*lengths, left], strict=True))
        for start, value in zip(starts, later, strict=True):
            out = torch.where(t >= start, value, out)
        return out

    return Schedule(factor, parts[-1].needs)


def _length(start: Any, end: Any) -> Any:
    """Of a piece; 1 where it is never in use, for what a schedule is at t / 0."""
    length = end - start
    if isinstance(length, Tensor):
        return torch.where(length > 0, length, 1)
    return length if length > 0 else 1


def product(*schedules: Callable[..., Any]) -> Schedule:
    """The product of the factors.

    Args:
        *schedules: at least one; plain functions of ``(t, num_steps)`` too.

    Returns:
        A `Schedule`; it needs what they need.

    Example:
        >>> from fmeta.schedules import linear, warmup
        >>> product(warmup(2), linear(steps=4))(torch.arange(5))
        tensor([0.0000, 0.3750, 0.5000, 0.2500, 0.0000])
    """
    if not schedules:
        raise ValueError("product needs at least one schedule")
    parts = [as_schedule(s) for s in schedules]

    def factor(t: Tensor, num_steps: Any) -> Tensor:
        out = parts[0](t, num_steps)
        for part in parts[1:]:
            out = out * part(t, num_steps)
        return out

    return Schedule(factor, frozenset().union(*(p.needs for p in parts)))


def relative(schedule: Callable[..., Any]) -> Schedule:
    """The schedule with all its times in units of the horizon: ``schedule(t / num_steps, 1)``.

    Args:
        schedule: built with fractions of the horizon where it takes numbers of updates.

    Returns:
        A `Schedule` that needs ``num_steps``.

    Example:
        >>> from fmeta.schedules import piecewise
        >>> relative(piecewise([0.5, 0.75], [1.0, 0.1, 0.01]))(torch.arange(4), 4)
        tensor([1.0000, 1.0000, 0.1000, 0.0100])
    """
    inner = as_schedule(schedule)
    return Schedule(
        lambda t, num_steps: inner(t / num_steps, 1),
        frozenset({"num_steps"}),
    )
