"""Another order of the axes of a tensor to work in, so that loops over it are long."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

__all__ = ["Layout", "long_axis_last", "small_matrices_first"]

# Below this many elements, a loop over a matrix is too short to be fast.
_SHORT = 2**8
# Loops over fewer elements than this hardly use a vector of numbers.
_LANES = 8


class Layout(NamedTuple):
    """An order of axes: working axis i is axis ``order[i]`` of the tensor as it is given.

    Trailing axes of a tensor beyond these (of several decays, say) stay behind.

    Attributes:
        batch: leading axes, in the given order, that are those of a stack.
    """

    order: tuple[int, ...]
    batch: int = 0

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(self.order.index(i) for i in range(len(self.order)))

    def into(self, x: Tensor, before: int = 0) -> Tensor:
        """A view in the working order.

        Args:
            before: axes of ``x`` that come before those of the tensor.
        """
        return x.permute(_around(self.order, x, before))

    def back(self, x: Tensor, before: int = 0) -> Tensor:
        """A view of a tensor in the working order, in the given one."""
        return x.permute(_around(self.inverse, x, before))

    def fits(self, x: Tensor) -> bool:
        """Whether loops over a tensor in the working order go along its memory."""
        return x.stride(self.order[-1]) == 1

    def empty(self, x: Tensor) -> Tensor:
        """Memory like ``x``, in the given order, over which such loops do.

        Axes of a stack stay outermost, so that each of its tensors is in one piece.
        """
        b = self.batch
        order = (*range(b), *(i for i in self.order if i >= b))
        y = x.new_empty([x.shape[i] for i in order])
        return y.permute([order.index(i) for i in range(x.ndim)])


def small_matrices_first(shape: tuple[int, ...], batch: int = 0) -> Layout | None:
    """For many small matrices: the last two axes first; None where they are fine as they are.

    The kernels of a convolution, ``(out, in, 3, 3)``, have innermost loops of 3 as they lie in
    memory; as ``(3, 3, out, in)`` all loops are over ``in``.
    """
    n = len(shape)
    if n - batch < 3 or shape[-1] * shape[-2] >= _SHORT:
        return None
    return Layout((n - 2, n - 1, *range(n - 2)), batch)


def long_axis_last(shape: tuple[int, ...], axis: int, batch: int = 0) -> Layout | None:
    """The small axes behind ``axis`` before it; None where there are none, or ``axis`` is short.

    What is constant along an axis of the kernels of a convolution, ``(out, in, 3, 3)``, changes
    with every ninth number of its memory; as ``(out, 3, 3, in)`` loops over it are long.
    """
    behind = range(axis + 1, len(shape))
    short = math.prod(shape[i] for i in behind)
    if short == 1 or short >= _SHORT or shape[axis] < _LANES:
        return None
    return Layout((*range(axis), *behind, axis), batch)


def _around(order: tuple[int, ...], x: Tensor, before: int) -> list[int]:
    inside = [i + before for i in order]
    return [*range(before), *inside, *range(before + len(order), x.ndim)]
