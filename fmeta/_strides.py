"""The order in which the axes of tensors lie in memory, which compiled code is made for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["in_strides", "is_spread_out", "packed_strides"]


def is_spread_out(x: Tensor) -> bool:
    """Whether one element stands for several along an axis."""
    return any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))


def packed_strides(x: Tensor) -> tuple[int, ...]:
    """Strides without gaps, with the axes in the order in which those of ``x`` lie in memory."""
    strides, shape = x.stride(), x.shape
    if is_spread_out(x):
        return torch.empty(shape, device="meta").stride()
    found, step = [0] * x.ndim, 1
    for i in sorted(range(x.ndim), key=lambda i: (strides[i], -i)):
        found[i] = step
        step *= max(shape[i], 1)
    return tuple(found)


def in_strides(x: Tensor, strides: Sequence[int]) -> Tensor:
    """``x``, or a copy that has these strides."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
