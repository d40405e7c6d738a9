"""The schedules themselves: a number, a straight line, half a cosine, stairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta._numbers import check_number
from fmeta.schedules._combine import join
from fmeta.schedules._schedule import (
    Schedule,
    check_boundaries,
    lasting,
    listed,
    on_device,
    progress,
)

__all__ = ["constant", "cosine", "linear", "piecewise", "warmup", "warmup_cosine"]


def constant(value: Any = 1.0) -> Schedule:
    """The same factor at all times.

    Args:
        value: a number or scalar tensor.

    Returns:
        A `Schedule`.
    """
    check_number("value", value)
    return Schedule(lambda t, num_steps: on_device(value, t))


def linear(start: Any = 1.0, end: Any = 0.0, steps: Any = None) -> Schedule:
    """A straight line from ``start`` to ``end``: ``start + (end - start) min(t / steps, 1)``.

    After ``steps`` it stays at ``end``. Equals `torch.optim.lr_scheduler.LinearLR` with
    ``total_iters=steps``, and ``optax.linear_schedule``.

    Args:
        start, end: factors: numbers or scalar tensors.
        steps: length in updates, a number or scalar tensor; 0: at ``end`` at once; None: the
            horizon.

    Returns:
        A `Schedule`; it needs ``num_steps`` where ``steps`` is None.

    Example:
        >>> linear(steps=4)(torch.arange(6))
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000, 0.0000])
    """
    check_number("start", start)
    check_number("end", end)

    def factor(t: Tensor, length: Any) -> Tensor:
        done = progress(t, length)
        return (1 - done) * on_device(start, t) + done * on_device(end, t)

    return lasting(steps, factor)


def warmup(steps: Any, start: Any = 0.0) -> Schedule:
    """From ``start`` to 1 in a straight line: ``start + (1 - start) min(t / steps, 1)``.

    Afterwards it stays at 1. With ``start=0`` the first update is zero (it still fills moments).

    Args:
        steps: length in updates: a number or scalar tensor; 0: no warm-up.
        start: factor of the first update: a number or scalar tensor.

    Returns:
        A `Schedule`.

    Reference:
        Goyal et al., "Accurate, large minibatch SGD", 1706.02677, section 2.2.
    """
    return linear(start, 1.0, steps)


def cosine(end: Any = 0.0, steps: Any = None) -> Schedule:
    """From 1 to ``end`` along half a cosine: ``end + (1 - end) (1 + cos(pi t / steps)) / 2``.

    After ``steps`` it stays at ``end``. Up to there it equals
    `torch.optim.lr_scheduler.CosineAnnealingLR` (which rises again) with ``eta_min = end * lr``;
    it equals ``optax.cosine_decay_schedule`` with ``alpha=end``.

    Args:
        end: the last factor: a number or scalar tensor.
        steps: length in updates, a number or scalar tensor; None: the horizon.

    Returns:
        A `Schedule`; it needs ``num_steps`` where ``steps`` is None.

    Example:
        >>> cosine()(torch.arange(5), 4)
        tensor([1.0000, 0.8536, 0.5000, 0.1464, 0.0000])

    Reference:
        Loshchilov and Hutter, "SGDR", 1608.03983, equation 5 (without restarts).
    """
    check_number("end", end)

    def factor(t: Tensor, length: Any) -> Tensor:
        height = 0.5 * (1 + torch.cos(math.pi * progress(t, length)))
        return (1 - height) * on_device(end, t) + height

    return lasting(steps, factor)


def warmup_cosine(
    warmup_steps: Any, end: Any = 0.0, steps: Any = None, start: Any = 0.0
) -> Schedule:
    """`warmup`, then `cosine` over what is left.

    After ``steps`` it stays at ``end``. Equals ``optax.warmup_cosine_decay_schedule`` with a peak
    of 1 (whose ``decay_steps`` count the warm-up, as ``steps`` here).

    Args:
        warmup_steps: length of the warm-up in updates: a number or scalar tensor; 0: none.
        end: the last factor: a number or scalar tensor.
        steps: the whole length in updates, a number or scalar tensor; None: the horizon.
        start: factor of the first update: a number or scalar tensor.

    Returns:
        A `Schedule`; it needs ``num_steps`` where ``steps`` is None.

    Example:
        >>> warmup_cosine(2)(torch.arange(7), 6)
        tensor([0.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 0.0000])
    """
    whole = join([warmup(warmup_steps, start), cosine(end)], [warmup_steps])
    return lasting(steps, whole.factor)


def piecewise(boundaries: Sequence[Any] | Tensor, factors: Sequence[Any] | Tensor) -> Schedule:
    """Stairs: ``factors[i]`` from ``boundaries[i - 1]`` on, up to before ``boundaries[i]``.

    The last factor stays. With factors that are products of the scales before them it equals
    `torch.optim.lr_scheduler.MultiStepLR` and ``optax.piecewise_constant_schedule``.

    Args:
        boundaries: increasing numbers of updates: a sequence of numbers or scalar tensors, or a
            tensor ``(k,)``.
        factors: one more: a sequence of numbers or scalar tensors, or a tensor ``(k + 1,)``.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: when there is not one factor more than boundaries, or boundaries are
            known not to increase.

    Example:
        >>> piecewise([2, 4], [1.0, 0.1, 0.01])(torch.arange(6))
        tensor([1.0000, 1.0000, 0.1000, 0.1000, 0.0100, 0.0100])
    """
    limits, heights = listed("boundaries", boundaries), listed("factors", factors)
    if len(heights) != len(limits) + 1:
        raise ValueError(
            f"piecewise takes one factor more than boundaries, got {len(heights)} factors for "
            f"{len(limits)} boundaries"
        )
    check_boundaries(limits)
    for height in heights:
        check_number("factors", height)

    def factor(t: Tensor, num_steps: Any) -> Tensor:
        out = on_device(heights[0], t) + 0 * t
        for limit, height in zip(limits, heights[1:], strict=True):
            out = torch.where(t >= on_device(limit, t), on_device(height, t), out)
        return out

    return Schedule(factor)
