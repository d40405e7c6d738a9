"""Accumulators and features that learned rules share.

Functions with ``out`` write into it where it is given (for callers that own the memory and record
no derivative) and return a new tensor otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fmeta._autodiff import inside_transform
from fmeta.optimizers._common import ema

__all__ = [
    "Tile",
    "clamped_rsqrt",
    "factored_axes",
    "factors",
    "is_unobserved",
    "normalize",
    "split",
    "stacked_ema",
    "start_factored",
    "sum_of_squares",
    "tiled_means",
]


def stacked_ema(old: Tensor, x: Tensor, decays: Sequence[float]) -> Tensor:
    """EMAs of one quantity with several decays.

    Args:
        old: shape ``(*x.shape, len(decays))``.
        x: the new value.
    """
    pairs = zip(old.unbind(-1), decays, strict=True)
    return torch.stack([ema(o, x, decay) for o, decay in pairs], -1)


def factored_axes(shape: Sequence[int]) -> tuple[int, int]:
    """The two largest axes ``(d1, d0)`` of a tensor, d0 the largest; of equal ones the last.

    As a stable sort has it. The references call one that is not stable on every machine, so their
    own runs of square kernels may differ there.
    """
    order = sorted(range(len(shape)), key=lambda i: shape[i])
    return order[-2], order[-1]


def start_factored(param: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Zero factored second moments: rows (without axis d0) and columns (without d1) of the mean.

    Returns:
        ``(row, col)``, with a trailing axis of ``width`` decays.
    """
    d1, d0 = factored_axes(param.shape)
    without = [[n for i, n in enumerate(param.shape) if i != d] for d in (d0, d1)]
    return param.new_zeros(*without[0], width), param.new_zeros(*without[1], width)


def clamped_rsqrt(x: Tensor, floor: float = 1e-9) -> Tensor:
    """``1 / sqrt(max(x, floor))``: value and derivatives of every order are finite."""
    return torch.rsqrt(torch.clamp(x, min=floor))


def factors(row: Tensor, col: Tensor, axes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Adafactor's factors, whose product stands for ``1 / sqrt`` of the second moment.

    Args:
        row: means over axis d0, ``(*leaf without d0, width)``.
        col: means over axis d1, ``(*leaf without d1, width)``.
        axes: ``(d1, d0)``.

    Returns:
        ``(row_factor, col_factor)`` of the shapes of ``row`` and ``col``.
    """
    d1, d0 = axes
    total = row.mean(d1 - 1 if d1 > d0 else d1, keepdim=True)
    return clamped_rsqrt(row / (total + 1e-9)), clamped_rsqrt(col)


def sum_of_squares(x: Tensor, dims: tuple[int, ...], fused: bool = False) -> Tensor:
    """Sum of squares over ``dims``, which stay as size 1.

    Args:
        fused: without a temporary; has no second derivative at 0.
    """
    if not dims:  # for torch these are all axes
        return x.square()
    if not fused:
        return x.square().sum(dims, keepdim=True)
    if x.ndim - 1 in dims:
        return torch.linalg.vector_norm(x, dim=dims, keepdim=True).square()

    # A norm over outer axes is slow: its loops go along them.
    def cut(at: Sequence[int]) -> Tensor:
        place = dict(zip(dims, at, strict=True))
        every = [slice(place[i], place[i] + 1) if i in place else slice(None) for i in axes]
        return x[tuple(every)]

    axes = range(x.ndim)
    total = torch.zeros_like(cut([0] * len(dims)))
    for at in itertools.product(*(range(x.shape[i]) for i in dims)):
        total.addcmul_(cut(at), cut(at))
    return total


def normalize(x: Tensor, dims: tuple[int, ...], eps: float = 1e-9) -> Tensor:
    """``x / sqrt(eps + mean(x^2))``, the mean over ``dims``."""
    mean = x.square().mean(dims, keepdim=True) if dims else x.square()
    return x * torch.rsqrt(eps + mean)


class Tile(NamedTuple):
    """A part of a tensor: a slice of each axis."""

    slices: tuple[slice, ...]
    shape: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:
        """The part of a tensor ``(*leaf)``, a view."""
        return x[self.slices]

    def of_broadcast(self, x: Tensor) -> Tensor:
        """The part of ``(features, *leaf)``, of which an axis may have size 1."""
        pairs = zip(self.slices, x.shape[1:], strict=True)
        return x[(slice(None), *(s if n > 1 else slice(None) for s, n in pairs))]


def split(
    shape: Sequence[int], size: int, matrix: Sequence[int] | None = None, *, alone: int
) -> Iterator[Tile]:
    """Tiles of at most ``size`` coordinates: whole matrices if possible, or whole rows.

    Args:
        matrix: axes of a matrix, in rising order; default: the last two.
        alone: matrices of at least this many coordinates do not share a tile.
    """
    axes = range(len(shape))
    matrix = axes[-2:] if matrix is None else matrix
    steps, left = [1] * len(shape), size
    shared = math.prod(shape[i] for i in matrix) < alone
    others = [i for i in reversed(axes) if i not in matrix]
    for i in [*reversed(matrix), *(others if shared else ())]:
        steps[i] = min(shape[i], max(left, 1))
        left //= steps[i]
    pairs = zip(shape, steps, strict=True)
    ranges = [[slice(a, min(a + step, n)) for a in range(0, n, step)] for n, step in pairs]
    for slices in itertools.product(*ranges):
        yield Tile(slices, tuple(s.stop - s.start for s in slices))


def tiled_means(
    fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, axes: tuple[int, int], size: int
) -> tuple[Tensor, Tensor]:
    """Means of ``fn(x)`` over axis d0 and over axis d1 of ``axes = (d1, d0)``, in little memory.

    Args:
        fn: elementwise, ``fn(part, out) -> out``.
        size: about how many coordinates are worked on at once, whole slices of the first axis.
    """
    d1, d0 = axes
    if x.numel() <= size:
        values = fn(x, torch.empty_like(x))
        return values.mean(d0), values.mean(d1)
    means = [x.new_zeros([n for i, n in enumerate(x.shape) if i != axis]) for axis in (d0, d1)]
    rows = max(1, size // (x.numel() // x.shape[0]))
    memory = torch.empty_like(x[:rows])
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        values = fn(part, memory[: part.shape[0]])
        for total, axis in zip(means, (d0, d1), strict=True):
            if axis == 0:
                total.add_(values.sum(0))
            else:
                torch.sum(values, axis, out=total[start : start + rows])
    return means[0].div_(x.shape[d0]), means[1].div_(x.shape[d1])


def is_unobserved(*tensors: Tensor) -> bool:
    """Whether nothing differentiates, batches or traces these, so that memory may be reused."""
    recording = torch.is_grad_enabled()
    return (
        not inside_transform()
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        and not any(recording and x.requires_grad for x in tensors)
    )
