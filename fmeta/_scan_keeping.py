"""A checkpointed loop that keeps what was dear to find: steps run again take it from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import _guard, trees
from fmeta._autodiff import inside_transform
from fmeta._remat import remat_keeping
from fmeta._scan import CURE, loop_length, scan

__all__ = ["scan_keeping"]

Tree = Any


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

    if not (torch.is_grad_enabled() or inside_transform()):  # nothing will be run again
        return scan(without, carry, xs, consts=consts)
    first_x = trees.map(lambda x: x[0] if isinstance(x, Tensor) else x, xs)
    _guard.refuse_closures_and_noise(without, carry, first_x, *consts, cure=CURE)

    def first(carry: Tree, xs: Tree, *consts: Tree) -> tuple[Tree, Tree]:
        kept = _Kept(loop_length(xs))

        def step(carry: Tree, x: Tree, *consts: Tree) -> tuple[Tree, Tree]:
            carry, y, found = body(carry, x, *consts)
            kept.append(found)
            return carry, y

        return scan(step, carry, xs, consts=consts), kept.stacked()

    def again(found: Tree, carry: Tree, xs: Tree, *consts: Tree) -> tuple[Tree, Tree]:
        def step(carry: Tree, x: Tree, *consts: Tree) -> tuple[Tree, Tree]:
            carry, y, _ = body(carry, x[0], *consts, known=x[1])
            return carry, y

        return scan(step, carry, (xs, found), consts=consts, checkpoint=checkpoint)

    result: tuple[Tree, Tree] = remat_keeping(first, again)(carry, xs, *consts)
    return result


class _Kept:
    """Trees of so many steps, stacked as they come.

    A stack of all at the end would hold them twice, and leave holes all over the heap.
    """

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.trees: list[Tree] = []

    def append(self, tree: Tree) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self.trees.append(tree)  # which of them are batched is known at the end only
            return
        if not self.trees:
            self.trees.append(trees.map(self._room_for, tree))
        trees.map(self._write, self.trees[0], tree)
        self.count += 1

    def stacked(self) -> Tree:
        if self.count:
            return self.trees[0]
        return trees.map(
            lambda *xs: torch.stack(xs) if isinstance(xs[0], Tensor) else xs[0], *self.trees
        )

    def _room_for(self, x: Any) -> Any:
        return x.new_empty((self.total, *x.shape)) if isinstance(x, Tensor) else x

    def _write(self, room: Any, x: Any) -> Any:
        if isinstance(x, Tensor):
            room[self.count].copy_(x)
        return room
