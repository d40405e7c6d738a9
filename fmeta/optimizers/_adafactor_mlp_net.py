"""The network of `adafactor_mlp`: what its weights mean, and its step of a whole tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._common import count, one_minus
from fmeta.optimizers._coordinate_net import (
    EPS,
    TIMES,
    Layers,
    Time,
    layers_of,
    run_layers,
    time_bias,
    time_of,
)
from fmeta.optimizers._features import clamped_rsqrt, factored_axes, normalize
from fmeta.optimizers._layout import Layout, long_axis_last
from fmeta.optimizers._tiles import Scratch

__all__ = [
    "Decays",
    "Net",
    "Sides",
    "axes_of",
    "layout_of",
    "net_of",
    "of_sides",
    "planes",
    "second_moments",
    "start",
    "steps",
    "width",
]

Tree = Any


class Decays(NamedTuple):
    """Of the momenta, the second moments and the factored second moments."""

    momentum: tuple[float, ...]
    rms: tuple[float, ...]
    adafactor: tuple[float, ...]

    @property
    def own(self) -> int:
        """Features before those of rows and columns: g, p, m, v, m v^-1/2, v^-1/2, factored g."""
        return 2 + 2 * len(self.momentum) + 2 * len(self.rms) + len(self.adafactor)


class Net(NamedTuple):
    """What the weights mean, the same for all tensors.

    The features of rows and columns are constant along an axis. They are not laid out for every
    coordinate, but go through the first layer once for a row or column; for a tensor that is not
    factored both are its second moments.

    Attributes:
        momentum, rms: ``1 - decay`` of each, scalars.
        adafactor: the same in one tensor, ``(decays,)``.
        columns: the first layer of the features that differ from coordinate to coordinate,
            ``(units, features)``.
        flat_columns: those of a tensor that is not factored.
        sides: the first layer of rows and of columns, each ``(units, 2 * decays)``.
        time: the first layer of time.
        layers: those after the first, with the multipliers.
        scratch: memory for tiles, of a step.
        memo: what compiled loops take these as, once it is made, of a step.
    """

    momentum: Sequence[Tensor]
    rms: Sequence[Tensor]
    adafactor: Tensor
    columns: Tensor
    flat_columns: Tensor
    sides: tuple[Tensor, Tensor]
    time: Time
    layers: Layers
    scratch: Scratch
    memo: dict[bool, list[Tensor]]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        layers = [x for pair in self.layers for x in pair]
        columns = [self.columns, self.flat_columns, *self.sides]
        return [*self.momentum, *self.rms, self.adafactor, *columns, *self.time, *layers]


class Sides(NamedTuple):
    """What is known of rows and columns alone: size 1 on the axis it lacks.

    Attributes:
        row_factor, col_factor: ``(decays, *)``, whose product stands for ``1 / sqrt`` of the second
            moment.
        row_bias, col_bias: parts of the first layer, ``(units, *)``.
    """

    row_factor: Tensor
    col_factor: Tensor
    row_bias: Tensor
    col_bias: Tensor


def width(decays: Decays) -> int:
    """Number of features, those of time included."""
    return decays.own + 5 * len(decays.adafactor) + len(TIMES)


def planes(decays: Any) -> list[str]:
    """Keys of the hidden state that have the leaf's shape.

    Args:
        decays: `Decays` or a `Net`.
    """
    momenta = [f"m{i}" for i in range(len(decays.momentum))]
    return momenta + [f"rms{i}" for i in range(len(decays.rms))]


def start(p: Tensor, decays: Decays) -> dict[str, Tensor]:
    """The first hidden state of a leaf."""
    layout, n = layout_of(tuple(p.shape), 0), len(decays.adafactor)
    like = p if layout is None else layout.empty(p)
    state = {name: torch.zeros_like(like) for name in planes(decays)}
    lacks: dict[str, int | None] = {"v": None}
    if p.ndim > 1:
        d1, d0 = factored_axes(p.shape)
        lacks = {"row": d0, "col": d1}
    for name, axis in lacks.items():
        # Decays first in memory, which is how they are worked with.
        shape = [size for i, size in enumerate(p.shape) if i != axis]
        state[name] = p.new_zeros(n, *shape).movedim(0, -1)
    return {**state, "count": count(p)}


def net_of(th: Tree, initial: Decays, step_mult: float, exp_mult: float) -> Net:
    """The network that these weights make, with decays ``1 - exp(10 (log(1 - d) / 10 + theta))``.

    The decays of squares are cut to [0, 1].
    """
    weights = []
    for name, values in zip(Decays._fields, initial, strict=True):
        theta = th[f"{name}_decays"]
        # Filled, not made of a list: a transform does not allow that on each device.
        before = [theta.new_full((), math.log(one_minus(d)) / 10) for d in values]
        d = 1 - torch.exp(10 * (torch.stack(before) + theta))
        weights.append(1 - (d if name == "momentum" else d.clamp(0, 1)))
    w0, a, at = th["w0"], len(initial.adafactor), initial.own
    row, col, row_root, col_root = (w0.narrow(0, at + i * a, a) for i in range(4))
    own = [w0.narrow(0, 0, at), w0.narrow(0, at + 4 * a, a)]
    return Net(
        weights[0].unbind(0),
        weights[1].unbind(0),
        weights[2],
        torch.cat(own).mT,
        torch.cat([*own, row + col, row_root + col_root]).mT,
        (torch.cat([row, row_root]).mT, torch.cat([col, col_root]).mT),
        time_of(th),
        layers_of(th, step_mult, exp_mult),
        Scratch(),
        {},
    )


def steps(
    net: Net, p: Tensor, g: Tensor, h: Mapping[str, Tensor], batch: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-step_mult d exp(exp_mult e)`` for a whole tensor or a stack of them, and the new state."""
    square, new = g * g, {}
    for name, weight in zip(planes(net), (*net.momentum, *net.rms), strict=True):
        new[name] = torch.lerp(h[name], square if name.startswith("rms") else g, weight)
    m = torch.stack([new[f"m{i}"] for i in range(len(net.momentum))])
    v = torch.stack([new[f"rms{i}"] for i in range(len(net.rms))])
    root = torch.rsqrt(v + 1e-6)
    rows = [torch.stack([g, p]), m, v, m * root, root]
    bias, axes = time_bias(net.time, h["count"], p, batch), axes_of(p, batch)
    if axes is None:
        columns, second = net.flat_columns, second_moments(net, h, {"v": square})
        w = second["v"].movedim(-1, 0)
        rows += [clamped_rsqrt(w + 1e-9) * g, m * torch.rsqrt(w + 1e-6)]
        rows += [w, torch.rsqrt(w + 1e-8)]
    else:
        means = {"row": square.mean(axes[1]), "col": square.mean(axes[0])}
        columns, second = net.columns, second_moments(net, h, means)
        sides = of_sides(net, second, axes, batch)
        factor = sides.row_factor * sides.col_factor
        rows += [factor * g, m * factor]
        bias = bias + sides.row_bias + sides.col_bias
    delta = run_layers(columns, bias, torch.cat(rows), net.layers, p, batch)
    return delta, {**new, **second, "count": h["count"] + 1}


def axes_of(p: Tensor, batch: int) -> tuple[int, int] | None:
    """``(d1, d0)``, the second largest axis of a leaf and the largest; None for fewer than two."""
    if p.ndim - batch < 2:
        return None
    d1, d0 = factored_axes(p.shape[batch:])
    return d1 + batch, d0 + batch


def layout_of(shape: tuple[int, ...], batch: int) -> Layout | None:
    """The order of axes in which tiles and the state lie in memory; None: as they are given."""
    if len(shape) - batch < 2:
        return None
    return long_axis_last(shape, batch + max(factored_axes(shape[batch:])), batch)


def second_moments(
    net: Net, h: Mapping[str, Tensor], squares: Mapping[str, Tensor], own: bool = False
) -> dict[str, Tensor]:
    """Averages of squares with each decay, on a trailing axis.

    Args:
        squares: ``row``, ``col``: means of squared gradients; or ``v``: squared gradients.
        own: whether the state's memory is used for the new one.
    """
    found = {}
    for name, square in squares.items():
        weight = net.adafactor.reshape(-1, *(1,) * square.ndim)
        old = h[name].movedim(-1, 0)
        new = torch.lerp(old, square + 1e-30, weight, out=old if own else None)
        found[name] = h[name] if own else new.movedim(0, -1)
    return found


def of_sides(net: Net, second: Mapping[str, Tensor], axes: tuple[int, int], batch: int) -> Sides:
    """Factors of rows and columns, and what their features give in the first layer.

    Args:
        second: ``row`` and ``col`` of `second_moments`.
        axes: of `axes_of`.
    """
    d1, d0 = axes
    row = second["row"].movedim(-1, 0).unsqueeze(d0 + 1)
    col = second["col"].movedim(-1, 0).unsqueeze(d1 + 1)
    share = row / (row.mean(d1 + 1, keepdim=True) + 1e-9)
    biases = []
    for x, columns in zip((row, col), net.sides, strict=True):
        y = torch.cat([x, torch.rsqrt(x + 1e-8)])
        y = normalize(y, tuple(range(1 + batch, y.ndim)), EPS)
        biases.append((columns @ y.flatten(1)).reshape(-1, *y.shape[1:]))
    return Sides(clamped_rsqrt(share), clamped_rsqrt(col), *biases)
