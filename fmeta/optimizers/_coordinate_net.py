"""A small network that sees every coordinate of a tensor: its layers, run whole or tile by tile.

`mlp` and `adafactor_mlp` have this in common: features of each coordinate, divided by their root
mean square over the leaf, go through a few layers (ReLU) to two numbers, direction d and magnitude
e; the step is ``d exp(exp_mult e)``. Features come feature first, ``(features, *leaf)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._features import sum_of_squares
from fmeta.optimizers._initial import truncated_normal
from fmeta.optimizers._member_networks import in_tiles, undifferentiated_now
from fmeta.random import own

__all__ = [
    "EPS",
    "TIMES",
    "Layers",
    "Time",
    "count_layers",
    "draw_layers",
    "layers_of",
    "run_layers",
    "time_bias",
    "time_of",
]

Tree = Any

EPS = 1e-5  # of the features' mean squares
TIMES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)
# Units of a first layer, and coordinates, from which layers are the most of a step, not features
# and calls.
_WIDE, _LONG = 16, 2**8

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
    constant = undifferentiated_now()
    squares = sum_of_squares(x, tuple(range(1 + batch, x.ndim)), fused=constant)
    scale = torch.rsqrt(squares / math.prod(p.shape[batch:]) + EPS)
    if scale.numel() == scale.shape[0]:
        columns = columns * scale.flatten()
    else:
        x = x * scale
    if constant and len(columns) >= _WIDE and n >= _LONG:
        if bias[0].numel() > 1:
            bias = bias.expand(-1, *p.shape)
        weights = [columns, *(w for w, _ in layers)]
        delta = in_tiles(x.reshape(-1, n), weights, [bias.flatten(1), *(b for _, b in layers)])
        return delta.reshape(p.shape)
    y = columns @ x.reshape(-1, n) + bias.expand(-1, *p.shape).reshape(-1, n)
    for w, b in layers:
        y = w @ torch.relu(y) + b
    direction, magnitude = y.unbind(0)
    return (direction * torch.exp(magnitude)).reshape(p.shape)
