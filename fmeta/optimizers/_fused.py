"""Update rules as a few compiled kernels: what the rules share.

A rule's functions of one tensor are cut where a number is needed that only a whole pass over the
tensor gives (a mean, a root mean square). Between two cuts everything (moments, features, the small
network) is elementwise, and `torch.compile` makes one loop of it: features never leave the
registers. The network is written out unit by unit, since a matrix product would need its inputs in
memory. The same source gives C++ on a CPU and Triton on a GPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["FUSED_NUMEL", "compiled", "layer", "sums_of_squares"]

# Smaller tensors are stacked and updated together, which no compiled loop would make faster.
FUSED_NUMEL = 2**13
# One for each number of axes, and for each set of axes of size 1.
_VARIANTS = 64


@functools.cache
def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` compiled, once a process, for tensors of any size.

    Args:
        fn: a function of a module: pure, of tensors, lists of tensors and numbers.
    """
    more: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        more["recompile_limit"] = _VARIANTS
    return torch.compile(fn, fullgraph=True, dynamic=True, **more)


def layer(rows: Sequence[Tensor], w: Tensor, bias: Sequence[Any]) -> list[Tensor]:
    """``bias + w @ rows``, unit by unit.

    Args:
        rows: F features, each ``(*leaf)``.
        w: ``(units, F)``.
        bias: of each unit, to be broadcast over the leaf.
    """
    outputs = []
    for j, b in enumerate(bias):
        total = b
        for i, row in enumerate(rows):
            total = total + w[j, i] * row
        outputs.append(total)
    return outputs


def sums_of_squares(rows: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """Sum of squares of each row over ``dims``, which stay as size 1."""
    return [row.square().sum(tuple(dims), keepdim=True) for row in rows]
