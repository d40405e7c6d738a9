"""A checkpointed loop that keeps what was dear to find: steps run again take it from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import _guard, trees
from fmeta._remat import remat_keeping
from fmeta._scan import CURE, loop_length, scan

__all__ = ["scan_keeping"]

Tree = Any

_functorch = torch._C._functorch


def scan_keeping(
    body: Callable[..., tuple[Tree, Tree, Tree]],
    carry: Tree,
    xs: Tree,
    *,
    consts: Sequence[Tree],
    checkpoint: str | int,
) -> tuple[Tree, Tree]:
    """As `fmeta.scan` of a body that can go without some of its work where it knows the result.

    The first pass through the loop keeps ``found`` of every step, and nothing else: no state. The
    backward pass is that of the checkpointed scan whose steps get it as ``known``.

    Args:
        body: ``body(carry, x, *consts, known=None) -> (carry, y, found)``. With ``known``, the
            ``found`` of the same step, values and derivatives must be the same.
        carry, xs, consts, checkpoint: as of `fmeta.scan`.

    Returns:
        ``(carry, ys)``.
    """

    def without(carry: Tree, x: Tree, *consts: Tree) -> tuple[Tree, Tree]:
        carry, y, _ = body(carry, x, *consts)
        return carry, y

    if not _may_be_pulled_back((carry, xs, consts)):  # then no step is run again
        return scan(without, carry, xs, consts=consts, checkpoint=checkpoint)
    first_x = trees.map(lambda x: x[0] if isinstance(x, Tensor) else x, xs)
    _guard.refuse_closures_and_noise(without, carry, first_x, *consts, cure=CURE)
    rebuild: list[Callable[[Any], Tree]] = []  # known after the first step

    def first(carry: Tree, xs: Tree, *consts: Tree) -> tuple[Tree, Tree]:
        kept = _Kept(loop_length(xs))

        def step(carry: Tree, x: Tree, *consts: Tree) -> tuple[Tree, Tree]:
            carry, y, found = body(carry, x, *consts)
            tensors, rebuild_found = trees.tensors(found)
            rebuild[:] = [rebuild_found]
            kept.append(tensors)
            return carry, y

        return scan(step, carry, xs, consts=consts), kept.stacked()

    def again(found: Tree, carry: Tree, xs: Tree, *consts: Tree) -> tuple[Tree, Tree]:
        def step(carry: Tree, x: Tree, *consts: Tree) -> tuple[Tree, Tree]:
            carry, y, _ = body(carry, x[0], *consts, known=rebuild[0](x[1]))
            return carry, y

        return scan(step, carry, (xs, found), consts=consts, checkpoint=checkpoint)

    result: tuple[Tree, Tree] = remat_keeping(first, again)(carry, xs, *consts)
    return result


def _may_be_pulled_back(given: Tree) -> bool:
    """Whether a derivative in reverse mode may be asked of a function of these."""
    if torch.compiler.is_compiling():
        return True
    stack = _functorch.get_interpreter_stack() or ()
    if any(i.key() == _functorch.TransformType.Grad for i in stack):
        return True
    if not torch.is_grad_enabled():
        return False
    for x in trees.leaves(given):
        while isinstance(x, Tensor) and not x.requires_grad and _functorch.is_batchedtensor(x):
            x = _functorch.get_unwrapped(x)
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


class _Kept:
    """Tensors of so many steps, stacked as they come.

    Stacks of all at the end would hold them twice, and leave holes all over the heap.
    """

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.rooms: list[Tensor] = []
        self.columns: list[list[Tensor]] = []

    def append(self, tensors: list[Tensor]) -> None:
        if _functorch.peek_interpreter_stack() is not None:
            # Which of them are batched is known at the end only.
            self.columns = self.columns or [[] for _ in tensors]
            for column, x in zip(self.columns, tensors, strict=True):
                column.append(x)
            return
        if not self.rooms:
            self.rooms = [x.new_empty((self.total, *x.shape)) for x in tensors]
        for room, x in zip(self.rooms, tensors, strict=True):
            room[self.count].copy_(x)
        self.count += 1

    def stacked(self) -> list[Tensor]:
        while self.columns:  # one at a time is held twice
            self.rooms.append(torch.stack(self.columns.pop(0)))
        return self.rooms
