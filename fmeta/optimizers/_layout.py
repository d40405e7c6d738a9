"""Another order of the axes of a tensor to work in, so that loops over it are long."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Layout", "small_matrices_first"]

# Below this many elements, a loop over a matrix is too short to be fast.
_SHORT = 2**8


class Layout(NamedTuple):
    """An order of axes: working axis i is axis ``order[i]`` of the tensor as it is given.

    Trailing axes of a tensor beyond these (of several decays, say) stay behind.
    """

    order: tuple[int, ...]

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(self.order.index(i) for i in range(len(self.order)))

    def into(self, x: Tensor) -> Tensor:
        """A view in the working order."""
        return x.permute(*self.order, *range(len(self.order), x.ndim))

    def back(self, x: Tensor) -> Tensor:
        """A view of a tensor in the working order, in the given one."""
        return x.permute(*self.inverse, *range(len(self.order), x.ndim))

    def into_without(self, x: Tensor, axis: int) -> Tensor:
        """The same for a tensor that lacks ``axis`` (of the given order)."""
        return self.into(x.unsqueeze(axis)).squeeze(self.order.index(axis))

    def back_without(self, x: Tensor, axis: int) -> Tensor:
        """Back for a tensor that lacks ``axis`` (of the given order)."""
        return self.back(x.unsqueeze(self.order.index(axis))).squeeze(axis)


def small_matrices_first(shape: tuple[int, ...], batch: int = 0) -> Layout | None:
    """For many small matrices: the last two axes first; None where they are fine as they are.

    The kernels of a convolution, ``(out, in, 3, 3)``, have innermost loops of 3 as they lie in
    memory; as ``(3, 3, out, in)`` all loops are over ``in``.
    """
    n = len(shape)
    if n - batch < 3 or shape[-1] * shape[-2] >= _SHORT:
        return None
    return Layout((n - 2, n - 1, *range(n - 2)))
