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

from fmeta.optimizers._features import sum_of_squares
from fmeta.optimizers._initial import truncated_normal
from fmeta.optimizers._tiles import Cuts, Scratch
from fmeta.random import own

__all__ = [
    "EPS",
    "TIMES",
    "Features",
    "Layers",
    "Time",
    "count_layers",
    "draw_layers",
    "layers_of",
    "run_layers",
    "tile_size",
    "tiled_steps",
    "time_bias",
    "time_of",
]

Tree = Any

EPS = 1e-5  # of the features' mean squares
TIMES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)

# Where no derivative is recorded: numbers that a tile's features and layers take, so that they stay
# in the last cache of a CPU (measured: a quarter of it is slower by half, as each operation has its
# price, twice as many by a third); elsewhere, coordinates that keep the device busy.
_IN_CACHE = 3 * 2**20
# Numbers that the layers take at a time, which stay in a nearer cache (measured: half and twice as
# many are slower by a few percent).
_NEARER = 2**18
_ELSEWHERE = 2**22

Layers = list[tuple[Tensor, Tensor]]


class Time(NamedTuple):
    """The first layer's part of time: ``tanh(t / s - 1)`` for the scales s, and the bias.

    Attributes:
        scales: ``(11, 1)``.
        columns, bias: ``(units, 11)`` and ``(units, 1)``.
    """

    scales: Tensor
    columns: Tensor
    bias: Tensor


def time_of(th: Tree) -> Time:
    """The part of time of these weights: the last rows of ``w0``."""
    w0, n = th["w0"], len(TIMES)
    # Filled, not made of a list: a transform does not allow that on each device.
    scales = torch.stack([w0.new_full((1,), s) for s in TIMES])
    return Time(scales, w0.narrow(0, w0.shape[0] - n, n).mT, th["b0"].unsqueeze(1))


def time_bias(time: Time, steps: Tensor, p: Tensor, batch: int) -> Tensor:
    """The first layer's bias, ``(units, *)``, to be broadcast over ``p``.

    Args:
        steps: the number of steps done, one number or one for each of a stack.
        batch: leading axes of ``p`` that are those of a stack.
    """
    seen = torch.tanh(steps.reshape(1, -1).to(p.dtype) / time.scales - 1)
    bias = torch.addmm(time.bias, time.columns, seen)
    return bias.reshape(-1, *p.shape[:batch], *(1,) * (p.ndim - batch))


def draw_layers(sizes: Sequence[int], generator: torch.Generator | None) -> dict[str, Tensor]:
    """Weights ``w0: (in, out)``, ``b0: (out)``, ...: normal, cut at two sigma, and zero.

    The standard deviation (before the cut) is ``1 / sqrt(in)``.
    """
    generator = own(generator)
    th = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        th[f"w{i}"] = truncated_normal((inputs, outputs), generator)
        th[f"b{i}"] = torch.zeros(outputs, dtype=torch.float32)
    return th


def count_layers(th: Tree) -> int:
    """How many layers these weights have."""
    n = 0
    while f"w{n}" in th:
        n += 1
    return n


def layers_of(th: Tree, step_mult: float, exp_mult: float) -> Layers:
    """The layers after the first, ``(out, in)`` and ``(out, 1)``; the last one gives two numbers.

    These are the direction times ``-step_mult`` and the magnitude times ``exp_mult``.
    """
    layers = [(th[f"w{i}"].mT, th[f"b{i}"].unsqueeze(1)) for i in range(1, count_layers(th))]
    w, b = (x.narrow(0, 0, 2) for x in layers[-1])
    pair = [b.new_full((1,), -step_mult), b.new_full((1,), exp_mult)]
    factor = torch.stack(pair)
    return [*layers[:-1], (w * factor, b * factor)]


def run_layers(
    columns: Tensor, bias: Tensor, x: Tensor, layers: Layers, p: Tensor, batch: int
) -> Tensor:
    """``-step_mult d exp(exp_mult e)`` for a whole tensor or stack, of the shape of ``p``.

    Args:
        columns: the first layer, ``(units, features)``.
        bias: of the first layer, ``(units, *)``, to be broadcast over the leaf.
        x: ``(features, *leaf)``, not yet divided by their root mean squares.
        layers: of `layers_of`.
        batch: leading axes of ``p`` that are those of a stack.
    """
    n = p.numel()
    squares = sum_of_squares(x, tuple(range(1 + batch, x.ndim)))
    scale = torch.rsqrt(squares / math.prod(p.shape[batch:]) + EPS)
    if scale.numel() == scale.shape[0]:
        columns = columns * scale.flatten()
    else:
        x = x * scale
    y = columns @ x.reshape(-1, n) + bias.expand(-1, *p.shape).reshape(-1, n)
    for w, b in layers:
        y = w @ torch.relu(y) + b
    direction, magnitude = y.unbind(0)
    return (direction * torch.exp(magnitude)).reshape(p.shape)


class Features(NamedTuple):
    """How the features of a tile are made, in memory that is used again.

    Attributes:
        rows: how many.
        fill: ``(i, x, again)``: fills ``x``, ``(rows, *tile)``, with the features of tile i. The
            first time, not ``again``, it also brings the moments of the tile up to date.
        bias: tensors, ``(units, *)`` to be broadcast, one or two, whose sum is the first layer's
            bias.
    """

    rows: int
    fill: Callable[[int, Tensor, bool], None]
    bias: Sequence[Tensor]


def tile_size(columns: Tensor, layers: Layers, p: Tensor) -> int:
    """Coordinates a tile of ``p``, for a network with these layers."""
    if p.device.type != "cpu":
        return _ELSEWHERE
    widest = max(len(columns), *(len(w) for w, _ in layers))
    return _IN_CACHE // (columns.shape[1] + 2 * widest)


def tiled_steps(
    features: Features,
    cuts: Cuts,
    columns: Tensor,
    layers: Layers,
    p: Tensor,
    batch: int,
    scratch: Scratch,
) -> Tensor:
    """`run_layers`, tile by tile in memory that is used again and again; without derivatives.

    A leaf that is cut is passed over twice: for the features' sums of squares, then the features
    once more and the network. To store the features in between would cost more than to make them
    again.

    Args:
        cuts: of tensors of the shape of ``p``.
        scratch: memory for features and layers.
    """
    count, rows = math.prod(p.shape[batch:]), features.rows
    delta = torch.empty_like(p)
    deltas, biases = cuts.of(delta), [cuts.of(b, 1) for b in features.bias]
    known: list[Tensor] | None = None
    if any(axis >= batch for axis, *_ in cuts.axes):
        sums = p.new_zeros(rows, *p.shape[:batch], *(1,) * (p.ndim - batch))
        for i, part in enumerate(cuts.of(sums, 1)):
            x = scratch("features", p, (rows, *cuts.shapes[i]))
            features.fill(i, x, False)
            part.add_(_squares(x, batch))
        known = cuts.of(_scale(sums, count), 1)
    for i, shape in enumerate(cuts.shapes):
        x = scratch("features", p, (rows, *shape))
        features.fill(i, x, known is not None)
        scale = _scale(_squares(x, batch), count) if known is None else known[i]
        w = columns
        if scale.numel() == rows:
            w = columns * scale.flatten()
        else:
            x.mul_(scale)
        _run_tile(x, w, [parts[i] for parts in biases], layers, scratch, out=deltas[i])
    return delta


def _run_tile(
    x: Tensor, w: Tensor, bias: Sequence[Tensor], layers: Layers, scratch: Scratch, out: Tensor
) -> None:
    """The network on one tile: a few layers' worth at a time, which stay in a nearer cache.

    Args:
        x: features, ``(features, *tile)``.
        w: the first layer, their scales included.
        bias: as in `Features`, of the tile.
    """
    widths = [len(w), *(len(v) for v, _ in layers)]
    size = _NEARER // sum(widths) if x.device.type == "cpu" else out.numel()
    cuts, x, at = Cuts(out.shape, size), x.view(len(x), -1), 0
    outs, biases = cuts.of(out), [cuts.of(b, 1) for b in bias]
    for i, shape in enumerate(cuts.shapes):
        n = math.prod(shape)
        # Two layers at a time: one is read while the next is written.
        memory = [scratch(f"layer {j % 2}", x, (width, n)) for j, width in enumerate(widths)]
        y, own = memory[0], [parts[i] for parts in biases]
        if len(own) == 2:
            torch.add(*own, out=y.view(-1, *shape))
        else:
            y.view(-1, *shape).copy_(own[0])
        y.addmm_(w, x.narrow(1, at, n))
        for (v, b), z in zip(layers, memory[1:], strict=True):
            y = torch.addmm(b, v, y.relu_(), out=z)
        direction, magnitude = y.view(2, *shape).unbind(0)
        torch.mul(direction, magnitude.exp_(), out=outs[i])
        at += n


def _squares(x: Tensor, batch: int) -> Tensor:
    """Sums of squares over the axes of a leaf, which stay as size 1."""
    kept = x.shape[: 1 + batch]
    norm = torch.linalg.vector_norm(x.view(*kept, -1), dim=-1)
    return norm.square_().view(*kept, *(1,) * (x.ndim - 1 - batch))


def _scale(squares: Tensor, count: int) -> Tensor:
    return torch.rsqrt(squares / count + EPS)
