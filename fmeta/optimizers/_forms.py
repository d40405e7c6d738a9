"""The form in which compiled loops take a tensor: few axes, the longest loops along memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fmeta.optimizers._features import factored_axes

__all__ = ["Form", "Part", "form_of", "taken"]

# Loops over fewer coordinates than this would hardly use a vector of numbers.
_SHORT = 8


class Part(NamedTuple):
    """How one tensor of a leaf (or of a stack of leaves) is seen.

    Attributes:
        order: of its axes as they are given.
        sizes: of the axes as they are seen, of which some are several given ones.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]

    def into(self, x: Tensor) -> Tensor:
        """Contiguous; a view where the memory is in that order."""
        return x.permute(self.order).reshape(self.sizes).contiguous()

    def seen(self, x: Tensor) -> Tensor | None:
        """A view of ``x`` if its memory is in that order, else None: `into` without a copy."""
        order, sizes = _strides(self, tuple(x.shape))
        return x.as_strided(self.sizes, sizes) if x.stride() == order else None

    def back(self, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A view of the given shape of a tensor of the sizes."""
        inverse = [self.order.index(i) for i in range(len(self.order))]
        return y.view([shape[i] for i in self.order]).permute(inverse)


@functools.lru_cache(maxsize=2**12)
def _strides(part: Part, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides of a tensor of that shape whose memory is in the part's order, and of its sizes."""
    found = [0] * len(shape)
    for axis, stride in zip(part.order, _contiguous([shape[i] for i in part.order]), strict=True):
        found[axis] = stride
    return tuple(found), tuple(_contiguous(part.sizes))


def _contiguous(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


class Form(NamedTuple):
    """Of a stack of matrices, ``(B, r, c)``, or of kernels, ``(B, o, k, i)``.

    Attributes:
        kernels: whether the matrices over which features are normalised are the ``k`` numbers of a
            kernel; else they are all of ``r`` and ``c``.
        plane: of what has the leaf's shape.
        first: of factored second moments that lack ``c`` or ``i``: ``(B, decays, r)`` or
            ``(B, decays, o, k)``.
        second: of those that lack ``r`` or ``o``: ``(B, decays, c)`` or ``(B, decays, k, i)``.
        rows_first: whether ``first`` are the rows, which lack the largest axis.
    """

    kernels: bool
    plane: Part
    first: Part
    second: Part
    rows_first: bool

    @property
    def names(self) -> tuple[str, str]:
        """The entries of the state that are ``first`` and ``second``."""
        return ("row", "col") if self.rows_first else ("col", "row")


@functools.lru_cache(maxsize=2**12)
def form_of(shape: tuple[int, ...], batch: int, decays: int) -> Form | None:
    """The form for tensors whose features are normalised over the last two axes of a leaf.

    None where the two largest axes are neither these nor the two before them.

    Args:
        shape: of a leaf, or of a stack along ``batch`` leading axes.
        decays: size of a trailing axis of factored second moments.
    """
    n = len(shape)
    if n - batch < 2:
        return None
    d1, d0 = (axis + batch for axis in factored_axes(shape[batch:]))
    pair = {d1, d0}
    if pair == {n - 2, n - 1} and shape[-1] >= _SHORT:
        lead = tuple(range(n - 2))
        stack, (r, c) = math.prod(shape[:-2]), shape[-2:]
        side = (*lead, n - 1, n - 2)
        return Form(
            False,
            Part(tuple(range(n)), (stack, r, c)),
            Part(side, (stack, decays, r)),
            Part(side, (stack, decays, c)),
            d0 == n - 1,
        )
    if n >= 4 and pair == {n - 4, n - 3} and shape[-3] >= _SHORT:
        lead = tuple(range(n - 4))
        stack, (o, i), k = math.prod(shape[:-4]), shape[-4:-2], shape[-2] * shape[-1]
        return Form(
            True,
            Part((*lead, n - 4, n - 2, n - 1, n - 3), (stack, o, k, i)),
            Part((*lead, n - 1, n - 4, n - 3, n - 2), (stack, decays, o, k)),
            Part((*lead, n - 1, n - 3, n - 2, n - 4), (stack, decays, k, i)),
            d0 == n - 3,
        )
    return None


def taken(
    parts: Mapping[str, Part], state: Mapping[str, Tensor], own: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What loops that change the state in place take, and the new state: in the same memory.

    Args:
        parts: of each entry of the state.
        own: whether that memory may be the old state's.
    """
    given, new = [], {}
    for name, part in parts.items():
        old = state[name].detach()
        x = part.seen(old)
        if own and x is not None:
            given.append(x)
            new[name] = state[name]
            continue
        x = part.into(old) if x is None else x.clone()
        if x.data_ptr() == old.data_ptr():
            x = x.clone()
        given.append(x)
        new[name] = part.back(x, tuple(old.shape))
    return given, new
