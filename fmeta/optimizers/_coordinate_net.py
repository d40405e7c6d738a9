"""A small network that sees every coordinate of a tensor: its layers, run whole or tile by tile.

`mlp` and `adafactor_mlp` have this in common: features of each coordinate, divided by their root
mean square over the leaf, go through a few layers (ReLU) to two numbers, direction d and magnitude
e; the step is ``d exp(exp_mult e)``. Features come feature first, ``(features, *leaf)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._features import Tile, split, sum_of_squares
from fmeta.random import own

__all__ = [
    "EPS",
    "TILE",
    "TIMES",
    "Layers",
    "count_layers",
    "draw_layers",
    "layers_of",
    "run_layers",
    "tiled_steps",
    "time_bias",
    "time_features",
]

Tree = Any

EPS = 1e-5  # of the features' mean squares
# Coordinates a tile, where no derivative is recorded: the features of a tile stay in cache.
TILE = 2**15
# Leaves of a stack at least this large get tiles of their own.
_ALONE = 2**11
TIMES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)

Layers = list[tuple[Tensor, Tensor]]


def time_features(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """``tanh(t / s - 1)`` for the 11 scales s of time.

    Args:
        steps: the number of steps done, any shape.

    Returns:
        ``(11, *steps.shape)``.
    """
    t = steps.to(dtype)
    return torch.stack([torch.tanh(t / scale - 1) for scale in TIMES])


def time_bias(th: Tree, steps: Tensor, p: Tensor, batch: int) -> Tensor:
    """The first layer's bias with its part of time, ``(units, *)``, to be broadcast over ``p``.

    Args:
        th: the weights; the last rows of ``w0`` are those of time.
        steps: the number of steps done, one number or one for each of a stack.
        batch: leading axes of ``p`` that are those of a stack.
    """
    n = len(TIMES)
    time = time_features(steps.reshape(-1), p.dtype)
    bias = th["w0"].narrow(0, th["w0"].shape[0] - n, n).mT @ time + th["b0"].unsqueeze(1)
    return bias.reshape(-1, *p.shape[:batch], *(1,) * (p.ndim - batch))


def draw_layers(sizes: Sequence[int], generator: torch.Generator | None) -> dict[str, Tensor]:
    """Weights ``w0: (in, out)``, ``b0: (out)``, ...: normal, cut at two sigma, and zero.

    The standard deviation (before the cut) is ``1 / sqrt(in)``.
    """
    generator = own(generator)
    th = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        std = inputs**-0.5
        w = torch.empty(inputs, outputs, dtype=torch.float32)
        torch.nn.init.trunc_normal_(w, 0.0, std, -2 * std, 2 * std, generator=generator)
        th[f"w{i}"], th[f"b{i}"] = w, torch.zeros(outputs, dtype=torch.float32)
    return th


def count_layers(th: Tree) -> int:
    """How many layers these weights have."""
    n = 0
    while f"w{n}" in th:
        n += 1
    return n


def layers_of(th: Tree, exp_mult: Any) -> Layers:
    """The layers after the first, ``(out, in)`` and ``(out, 1)``; the last one gives two numbers.

    The second of these is the magnitude times ``exp_mult``.
    """
    layers = [(th[f"w{i}"].mT, th[f"b{i}"].unsqueeze(1)) for i in range(1, count_layers(th))]
    w, b = (x.narrow(0, 0, 2) for x in layers[-1])
    factor = torch.stack([torch.ones_like(b[0]), torch.full_like(b[0], exp_mult)])
    return [*layers[:-1], (w * factor, b * factor)]


def run_layers(
    columns: Tensor, bias: Tensor, x: Tensor, scale: Tensor, layers: Layers, p: Tensor
) -> Tensor:
    """``d exp(exp_mult e)`` for a whole tensor or stack, of the shape of ``p``.

    Args:
        columns: the first layer, ``(units, features)``.
        bias: of the first layer, ``(units, *)``, to be broadcast over the leaf.
        x: ``(features, *leaf)``.
        scale: what the features are multiplied by, ``(features, *)``, likewise.
    """
    columns, x = _scaled(columns, x, scale)
    n = p.numel()
    y = columns @ x.reshape(-1, n) + bias.expand(-1, *p.shape).reshape(-1, n)
    for w, b in layers:
        y = w @ torch.relu(y) + b
    direction, magnitude = y.unbind(0)
    return (direction * torch.exp(magnitude)).reshape(p.shape)


class Features(NamedTuple):
    """How the features of a tile are made, in memory that is used again.

    Attributes:
        rows: how many.
        advance: ``(tile, x)``: new moments of a tile, written where they belong; ``x`` is memory,
            ``(rows, *tile)``.
        make: ``(tile, x) -> x``: fills ``x`` with the features, from the new moments.
        bias: ``tile -> (part, other part or None)``, whose sum is the first layer's bias,
            ``(units, *)`` to be broadcast over the tile.
    """

    rows: int
    advance: Callable[[Tile, Tensor], None]
    make: Callable[[Tile, Tensor], Tensor]
    bias: Callable[[Tile], tuple[Tensor, Tensor | None]]


def tiled_steps(
    features: Features,
    columns: Tensor,
    layers: Layers,
    p: Tensor,
    leaf_axes: Sequence[int],
    size: int,
    factor: float,
) -> Tensor:
    """``factor d exp(exp_mult e)``, tile by tile in memory that is used again and again.

    Two passes: the features' sums of squares, then the features once more and the network. To
    store the features in between would cost more than to make them again. Only without
    derivatives.

    Args:
        leaf_axes: the axes of a leaf, the others being those of a stack.
        size: coordinates a tile.
    """
    tiles = list(split(p.shape, size, leaf_axes, alone=_ALONE))
    units = [columns.shape[0], *(w.shape[0] for w, _ in layers)]
    memory = _Memory(p, features.rows, units, max(math.prod(tile.shape) for tile in tiles))
    after = tuple(i + 1 for i in leaf_axes)

    squares = p.new_zeros(
        features.rows, *(1 if i in leaf_axes else n for i, n in enumerate(p.shape))
    )
    for tile in tiles:
        x = memory.rows(tile.shape)
        features.advance(tile, x)
        sums = sum_of_squares(features.make(tile, x), after, fused=True)
        tile.of_broadcast(squares).add_(sums)

    count = math.prod([p.shape[i] for i in leaf_axes])
    scale = torch.rsqrt(squares / count + EPS)
    whole = scale.numel() == features.rows
    if whole:
        columns = columns * scale.flatten()
    step = torch.empty_like(p)
    for tile in tiles:
        x = features.make(tile, memory.rows(tile.shape))
        buffers = memory.layers(math.prod(tile.shape))
        if not whole:
            columns_of, x = _scaled(columns, x, tile.of_broadcast(scale), own=True)
        else:
            columns_of = columns
        bias, other = features.bias(tile)
        if other is not None or bias.numel() > bias.shape[0]:
            first = buffers[0].view(-1, *tile.shape)
            bias = first.copy_(bias) if other is None else torch.add(bias, other, out=first)
        y = torch.addmm(bias.flatten(1), columns_of, x.flatten(1), out=buffers[0])
        for (w, b), out in zip(layers, buffers[1:], strict=True):
            y = torch.addmm(b, w, y.relu_(), out=out)
        direction, magnitude = (z.view(tile.shape) for z in y.unbind(0))
        torch.mul(direction.mul_(factor), magnitude.exp_(), out=tile.of(step))
    return step


def _scaled(columns: Tensor, x: Tensor, scale: Tensor, own: bool = False) -> tuple[Tensor, Tensor]:
    """Weights and features whose product has the features scaled, by the weights if possible."""
    if scale.numel() == scale.shape[0]:
        return columns * scale.flatten(), x
    return columns, (x.mul_(scale) if own else x * scale)


class _Memory:
    """Memory for one tile, used for all of them."""

    def __init__(self, like: Tensor, rows: int, units: Sequence[int], size: int) -> None:
        self.flat = like.new_empty(rows * size)
        self.count = rows
        self.units = units
        # Two layers at a time: one is read while the next is written.
        self.buffers = [like.new_empty(max(units) * size) for _ in range(2)]

    def rows(self, shape: tuple[int, ...]) -> Tensor:
        return self.flat[: self.count * math.prod(shape)].view(self.count, *shape)

    def layers(self, n: int) -> list[Tensor]:
        return [
            self.buffers[i % 2][: units * n].view(units, n) for i, units in enumerate(self.units)
        ]
