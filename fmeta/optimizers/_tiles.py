"""Tensors cut into tiles that stay in the cache, and memory that is used for all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["Cuts", "Scratch"]


class Cuts:
    """How tensors of one shape are cut: along as few axes as possible, the first ones that may be.

    Attributes:
        axes: ``(axis, length, count)`` for each axis that is cut; the last piece may be shorter.
        shapes: of the tiles.
    """

    def __init__(self, shape: Sequence[int], size: int, whole: int = 0) -> None:
        """Tiles of at most ``size`` coordinates, of about equal sizes.

        Args:
            whole: leading axes that are not cut.
        """
        self.axes: list[tuple[int, int, int]] = []
        lengths: list[list[int]] = []
        left = size // max(math.prod(shape[:whole]), 1)
        for axis in reversed(range(len(shape))):
            n = shape[axis]
            step = n if axis < whole else min(n, max(left, 1))
            left //= max(step, 1)
            if step < n:
                step = -(-n // -(-n // step))
                self.axes.insert(0, (axis, step, -(-n // step)))
            lengths.insert(0, [min(step, n - a) for a in range(0, n, step)] if n else [0])
        self.shapes = list(itertools.product(*lengths))

    def of(self, x: Tensor, before: int = 0) -> list[Tensor]:
        """The parts of a tensor that has the shape, or broadcasts to it.

        Args:
            before: axes that come before those of the shape.
        """
        parts = [x]
        for axis, step, count in self.axes:
            if x.shape[axis + before] > 1:
                parts = [y for part in parts for y in part.split(step, axis + before)]
            else:
                parts = [part for part in parts for _ in range(count)]
        return parts


class Scratch:
    """Memory for one tile after another, and one tensor after another of a step.

    New memory for each would cost the system's clearing of its pages.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of the shape, of the kind of ``like``; what it holds is not defined.

        Args:
            name: what is asked for by another name is other memory.
        """
        size, held = math.prod(shape), self._held.get(name)
        fits = held is not None and held.dtype == like.dtype and held.device == like.device
        if held is None or not fits or held.numel() < size:
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(*shape)
