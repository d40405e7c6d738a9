"""The form in which compiled loops take a tensor: few axes, the longest loops along memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fmeta.optimizers._features import factored_axes

__all__ = ["SHORT", "Form", "Part", "form_of", "taken"]

# Loops over fewer coordinates than this would hardly use a vector of numbers.
SHORT = 8


class Part(NamedTuple):
    """How one tensor of a leaf (or of a stack of leaves) is seen.

    Attributes:
        shape: as it is given.
        order: of its axes in which its memory is gone over.
        sizes: of the axes as they are seen, of which some are several given ones.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]

    def into(self, x: Tensor) -> Tensor:
        """Contiguous; a view where the memory is in that order."""
        return x.permute(self.order).reshape(self.sizes).contiguous()

    def seen(self, x: Tensor) -> Tensor | None:
        """A view of ``x`` if its memory is in that order, else None: `into` without a copy."""
        order, sizes = _strides(self)
        return x.as_strided(self.sizes, sizes) if x.stride() == order else None

    def back(self, y: Tensor) -> Tensor:
        """A view of the given shape of a tensor of the sizes."""
        inverse = [self.order.index(i) for i in range(len(self.order))]
        return y.view([self.shape[i] for i in self.order]).permute(inverse)


@functools.lru_cache(maxsize=2**12)
def _strides(part: Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides of a tensor of the shape whose memory is in that order, and of one of the sizes."""
    found = [0] * len(part.shape)
    contiguous = _contiguous([part.shape[i] for i in part.order])
    for axis, stride in zip(part.order, contiguous, strict=True):
        found[axis] = stride
    return tuple(found), tuple(_contiguous(part.sizes))


def _contiguous(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


class Form(NamedTuple):
    """Of a stack of matrices, ``(B, r, c)``, or of kernels, ``(B, o, k, i)``.

    Attributes:
        plane: of what has the leaf's shape.
        first: of factored second moments that lack ``c`` or ``i``: ``(B, decays, r)`` or
            ``(B, decays, o, k)``.
        second: of those that lack ``r`` or ``o``: ``(B, decays, c)`` or ``(B, decays, k, i)``.
        rows_first: whether ``first`` are the rows, which lack the largest axis.
    """

    plane: Part
    first: Part
    second: Part
    rows_first: bool

    def parts(self, names: Iterable[str]) -> dict[str, Part]:
        """Of the entries of the state; ``names`` are those with the leaf's shape."""
        sides = ("row", "col") if self.rows_first else ("col", "row")
        factored = zip(sides, (self.first, self.second), strict=True)
        return {**dict.fromkeys(names, self.plane), **dict(factored)}


@functools.lru_cache(maxsize=2**12)
def form_of(shape: tuple[int, ...], batch: int, decays: int) -> Form:
    """The form for a leaf of at least two axes, or a stack of them: as ``(B, o, k, i)``.

    The axes o and i are the two largest, along which second moments are factored; k is all others.

    Args:
        shape: of a leaf, or of a stack along ``batch`` leading axes.
        decays: size of a trailing axis of factored second moments.
    """
    d1, d0 = (axis + batch for axis in factored_axes(shape[batch:]))
    outer, inner = sorted((d1, d0))
    if shape[inner] < SHORT:  # loops are along it
        outer, inner = inner, outer
    lead, n = tuple(range(batch)), len(shape)
    others = tuple(axis for axis in range(batch, n) if axis not in (outer, inner))
    b, k = math.prod(shape[:batch]), math.prod(shape[axis] for axis in others)

    def side(own: tuple[int, ...], without: int, sizes: tuple[int, ...]) -> Part:
        order = (*lead, n - 1, *(axis - (axis > without) for axis in own))
        return Part((*shape[:without], *shape[without + 1 :], decays), order, (b, decays, *sizes))

    return Form(
        Part(shape, (*lead, outer, *others, inner), (b, shape[outer], k, shape[inner])),
        side((outer, *others), inner, (shape[outer], k)),
        side((*others, inner), outer, (k, shape[inner])),
        d0 == inner,
    )


def taken(
    parts: Mapping[str, Part], state: Mapping[str, Tensor], like: Tensor, own: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What loops that change the state in place take, and the new state: in the same memory.

    Args:
        parts: of each entry of the state.
        like: the leaf or the stack, whose dtype and device the state has.
        own: whether that memory may be the old state's.

    Raises:
        RuntimeError: for a state of another leaf, which compiled loops would not notice.
    """
    given, new = [], {}
    for name, part in parts.items():
        old = state[name].detach()
        if old.shape != part.shape or old.dtype != like.dtype or old.device != like.device:
            raise RuntimeError(
                f"the state's {name!r} is {tuple(old.shape)}, {old.dtype}, on {old.device}; for "
                f"this tensor it has to be {part.shape}, {like.dtype}, on {like.device}"
            )
        x = part.seen(old)
        if own and x is not None:
            given.append(x)
            new[name] = state[name]
            continue
        x = part.into(old) if x is None else x.clone()
        if x.data_ptr() == old.data_ptr():
            x = x.clone()
        given.append(x)
        new[name] = part.back(x)
    return given, new
