"""The order of axes in which rules written out number by number work, so that their loops are long.

The kernels of a convolution, ``(out, in, 3, 3)``, have innermost loops of 3 as they are given: too
short for a vector of numbers. From the smallest axis to the largest, ``(3, 3, in, out)``, they have
loops over ``out``. The state is handed back as views in the given order; it lies in memory as it is
worked on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._features import factored_axes
from fmeta.optimizers._fused import in_memory
from fmeta.optimizers._layout import Layout

__all__ = ["WRITTEN_NUMEL", "Order", "order_of", "stored", "sum_of_rows", "zeros_of"]

WRITTEN_NUMEL = 2**9  # smaller leaves are not worth the longer compilation

_LANES = 16  # float32 numbers of the longest vectors of a CPU


class Order(NamedTuple):
    """An order of axes for a leaf, and for what is known of its rows and columns alone.

    Attributes:
        leaf: of the leaf.
        sides: of ``row`` and ``col``, by name, which lack an axis and have one of decays behind.
    """

    leaf: Layout
    sides: Mapping[str, Layout]

    def into(self, x: Tensor) -> Tensor:
        """A tensor like the leaf in the working order; in memory, too.

        It is read in several loops, of which each would go across its rows.
        """
        if self.leaf.order == tuple(range(x.ndim)):
            return x
        return stored(self.leaf.into(x))

    def state_into(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A hidden state in the working order, decays first in memory; numbers stay as they are."""
        found = {}
        for name, x in state.items():
            if name in self.sides:
                found[name] = _packed(self.sides[name].into(x).movedim(-1, 0)).movedim(0, -1)
            else:
                found[name] = _packed(self.leaf.into(x)) if x.ndim else x
        return found

    def state_back(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views of a hidden state in the working order, in the given one."""
        return {k: self.sides.get(k, self.leaf).back(x) if x.ndim else x for k, x in state.items()}


def order_of(shape: tuple[int, ...]) -> Order:
    """From the smallest axis to the largest; as it is, where the last one is long enough.

    Args:
        shape: of a leaf of at least two axes.
    """
    order = tuple(range(len(shape)))
    if shape[-1] < _LANES:
        # Of equal axes in the order of `factored_axes`: rows and columns are the last two.
        order = tuple(sorted(order, key=lambda i: shape[i]))
    d1, d0 = factored_axes(shape)
    return Order(Layout(order), {"row": _without(order, d0), "col": _without(order, d1)})


def stored(x: Tensor) -> Tensor:
    """A copy of ``x`` that compiled code stores and does not compute again where it is read."""
    return in_memory(_packed(x))


def zeros_of(*sides: Tensor) -> Tensor:
    """Zeros of the shape that what is known of rows and columns spans, which torch does not know.

    Where they are added, a loop has the axes that rows and columns give it; without, torch takes
    what reads nothing else for a line of numbers, and goes over it in a loop of its own.

    Args:
        sides: numbers above zero.
    """
    row, col = (stored(torch.lt(x, 0).to(x.dtype)) for x in sides)
    return row + col


def sum_of_rows(x: Tensor) -> Tensor:
    """The sum of a tensor by way of the sum of its rows: one vector for a loop to add to."""
    return x.sum(tuple(range(x.ndim - 1))).sum()


def _packed(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _without(order: tuple[int, ...], axis: int) -> Layout:
    return Layout(tuple(i - (i > axis) for i in order if i != axis))
