"""The network of `velo` that sees coordinates: its features, and the steps it makes of them.

The formulas are written once, for a stack of leaves (one leaf is a stack of one): `steps` runs them
on whole tensors, `tiled_steps` tile by tile in memory that is used again, where no derivative is
recorded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._common import ema
from fmeta.optimizers._features import (
    Tile,
    clamped_rsqrt,
    factors,
    normalize,
    split,
    stacked_ema,
    sum_of_squares,
    tiled_means,
)

__all__ = ["INPUTS", "MOMENTS", "TILE", "Decays", "Net", "factored_axes", "steps", "tiled_steps"]

INPUTS = 30
MOMENTS = ("m0", "m1", "m2", "rms")
# Coordinates a tile, where no derivative is recorded: the features of a tile stay in cache.
TILE = 2**16

_EPS = 1e-5  # of the features' root mean squares
# m v^-1/2 has no eps: both are scaled by powers of two before v is clamped, so that it is exact
# down to v = 1e-21 and has finite derivatives in float32.
_M_UNIT, _V_UNIT = 2.0**20, 2.0**40
# Rows of w0 that have an input of their own at every coordinate; 15 to 26 are four groups of three
# (r, c, r^-1/2, c^-1/2), which are constant along an axis.
_OWN = (slice(0, 15), slice(27, 30))
_FACTORED = (15, 18)


class Decays(NamedTuple):
    """Of the momenta, the second moment and the factored second moments."""

    momentum: tuple[float, ...]
    rms: tuple[float, ...]
    adafactor: tuple[float, ...]


class Net(NamedTuple):
    """A network for each of B leaves: of layer i ``(B, in, out)`` and ``(B, out)``.

    There are 30 inputs; the outputs are direction, magnitude and one that is not used.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def factored_axes(shape: Sequence[int]) -> tuple[int, int]:
    """The two largest axes ``(d1, d0)``; of equal ones the first counts as the larger.

    But for kernels whose first two axes are equal and largest: there the second does.
    """
    order = sorted(range(len(shape)), key=lambda i: shape[i])
    d1, d0 = order[-2:]
    if shape[d1] == shape[d0] and not (len(shape) == 4 and (d1, d0) == (0, 1)):
        return d0, d1
    return d1, d0


def steps(
    net: Net, p: Tensor, g: Tensor, h: Mapping[str, Tensor], decays: Decays, exp_mult: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """``direction * exp(exp_mult * magnitude)`` of a stack of leaves, and the new state.

    Args:
        net: a network for each of the B leaves.
        p, g: ``(B, *leaf)``.
        h: the state, with the leading axis too.

    Returns:
        ``((B, *leaf), state)``.
    """
    g = _clamped(g)
    square = g * g
    new = _moments(g, square, h, decays)
    axes, small = _axes(p), None
    if axes is None:
        new["v"] = stacked_ema(h["v"], square + 1e-30, decays.adafactor)
    else:
        new |= _second_moments(h, square.mean(axes[1]), square.mean(axes[0]), decays)
        small = _factored(net, new, axes)
    n = p.shape[1:].numel()
    x = _features(p, g, new, small).reshape(-1, p.shape[0], n).transpose(0, 1)
    scale = torch.rsqrt(sum_of_squares(x, (2,)) / n + _EPS)
    bias = net.biases[0].unsqueeze(2)
    if small is not None:
        bias = (small.row_bias + small.col_bias).expand(-1, *p.shape)
        bias = bias.reshape(-1, p.shape[0], n).transpose(0, 1)
    x = (_columns(net, p) * scale.mT) @ x + bias
    for w, b in zip(net.weights[1:], net.biases[1:], strict=True):
        x = w.mT @ torch.relu(x) + b.unsqueeze(2)
    direction, magnitude = x.narrow(1, 0, 2).unbind(1)
    return (direction * torch.exp(exp_mult * magnitude)).reshape(p.shape), new


def tiled_steps(
    net: Net,
    p: Tensor,
    g: Tensor,
    h: Mapping[str, Tensor],
    decays: Decays,
    exp_mult: float,
    size: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, tile by tile in memory that is used again and again; only without derivatives.

    Two passes: the features' sums of squares, then the features once more and the network. To
    store the features in between would cost more than to make them of six tensors again.
    """
    new = {name: torch.empty_like(p) for name in MOMENTS}
    axes, small = _axes(p), None
    if axes is None:
        new["v"] = stacked_ema(h["v"], _clamped(g).square_().add_(1e-30), decays.adafactor)
    else:
        new |= _second_moments(h, *_squared_means(g, axes, size), decays)
        small = _factored(net, new, axes)
    tiles = list(split(p.shape, size, alone=p.numel() + 1))
    columns = _columns(net, p)
    memory = _Memory(p, columns.shape[2], net, max(math.prod(tile.shape) for tile in tiles))

    def features(tile: Tile, x: _Slots, values: Mapping[str, Tensor]) -> Tensor:
        of = None if small is None else small.of(tile)
        made = _features(tile.of(p), x.g, values, of, x)
        return made.view(made.shape[0], tile.shape[0], -1).transpose(0, 1)

    squares = p.new_zeros(p.shape[0], columns.shape[2], 1)
    for tile in tiles:
        x = memory.features(tile.shape)
        part = _clamped(tile.of(g), out=x.g)
        square = torch.mul(part, part, out=x.clipped)
        old = {name: tile.of(h[name]) for name in MOMENTS}
        values = {name: tile.of(y) for name, y in new.items() if small is None or name in MOMENTS}
        _moments(part, square, old, decays, values)
        squares[tile.slices[0]] += sum_of_squares(features(tile, x, values), (2,), fused=True)

    columns = columns * torch.rsqrt(squares / p.shape[1:].numel() + _EPS).mT
    layers = _folded(net, exp_mult)
    step = torch.empty_like(p)
    for tile in tiles:
        x, buffers, leaves = memory.features(tile.shape), memory.layers(tile), tile.slices[0]
        _clamped(tile.of(g), out=x.g)
        values = {name: tile.of(y) for name, y in new.items() if small is None or name in MOMENTS}
        made = features(tile, x, values)
        bias = net.biases[0][leaves].unsqueeze(2)
        if small is not None:
            of, bias = small.of(tile), buffers[0]
            parts = (y.transpose(0, 1) for y in (of.row_bias, of.col_bias))
            torch.add(*parts, out=bias.view(tile.shape[0], -1, *tile.shape[1:]))
        y = torch.baddbmm(bias, columns[leaves], made, out=buffers[0])
        for (w, b), out in zip(layers, buffers[1:], strict=True):
            y = torch.baddbmm(b[leaves], w[leaves], y.relu_(), out=out)
        direction, magnitude = (z.view(tile.shape) for z in y.unbind(1))
        torch.mul(direction, magnitude.exp_(), out=tile.of(step))
    return step, new


# -- formulas ----------------------------------------------------------------------------------


class _Small(NamedTuple):
    """What depends on the factored second moments alone, with size 1 on the axis it lacks."""

    row_factor: Tensor  # (3, B, *)
    col_factor: Tensor
    row_bias: Tensor  # (units, B, *), parts of the first layer
    col_bias: Tensor

    def of(self, tile: Tile) -> _Small:
        return _Small(*(tile.of_broadcast(x) for x in self))


def _axes(p: Tensor) -> tuple[int, int] | None:
    """The factored axes of a stack of leaves, or None for vectors and scalars."""
    if p.ndim < 3:
        return None
    d1, d0 = factored_axes(p.shape[1:])
    return d1 + 1, d0 + 1


def _clamped(g: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.clamp(g, -1000.0, 1000.0, out=out)


def _moments(
    g: Tensor,
    square: Tensor,
    h: Mapping[str, Tensor],
    decays: Decays,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Momenta and second moment after the clamped gradient ``g`` and its square."""
    new = {}
    for name, decay in zip(MOMENTS, (*decays.momentum, *decays.rms), strict=True):
        x = square if name == "rms" else g
        new[name] = ema(h[name], x, decay, None if out is None else out[name])
    return new


def _squared_means(g: Tensor, axes: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Means of the clamped gradient's square over d0 and over d1, in little memory."""

    def square(part: Tensor, out: Tensor) -> Tensor:
        return _clamped(part, out).square_()

    if g.shape[0] > 1:
        return tiled_means(square, g, axes, size)
    row, col = tiled_means(square, g.squeeze(0), (axes[0] - 1, axes[1] - 1), size)
    return row.unsqueeze(0), col.unsqueeze(0)


def _second_moments(
    h: Mapping[str, Tensor], row: Tensor, col: Tensor, decays: Decays
) -> dict[str, Tensor]:
    """Factored second moments after the means of the squared gradient over one axis each."""
    return {
        "row": stacked_ema(h["row"], row + 1e-30, decays.adafactor),
        "col": stacked_ema(h["col"], col + 1e-30, decays.adafactor),
    }


def _features(
    p: Tensor, g: Tensor, state: Mapping[str, Tensor], small: _Small | None, out: Any = None
) -> Tensor:
    """The features that differ from coordinate to coordinate, feature first.

    Args:
        p, g: ``(*shape)``, g clamped.
        state: ``m0``, ``m1``, ``m2``, ``rms`` after this gradient; ``v`` without ``small``.
        small: the factors, to be broadcast over the shape; None for vectors and scalars.
        out: memory, with ``g`` in its first row.

    Returns:
        ``(18, *shape)``, or ``(24, *shape)`` without ``small``; the order of `_columns`.
    """
    to = out or _Slots.none()
    rms = state["rms"]
    clipped = torch.clamp(g, -0.1, 0.1, out=to.clipped)
    m = torch.stack([state[name] for name in MOMENTS[:3]], out=to.m)
    root = torch.rsqrt(torch.add(rms, 1e-6, out=to.root), out=to.root)
    m_root = torch.mul(m, root, out=to.m_root)
    g_root = torch.mul(g, root, out=to.g_root)
    if small is not None:
        factor = torch.mul(small.row_factor, small.col_factor, out=to.m_factor)
        g_factor = torch.mul(factor, g, out=to.g_factor)
        m_factor = torch.mul(m, factor, out=to.m_factor)
    else:
        v = state["v"].movedim(-1, 0)
        g_factor = torch.mul(clamped_rsqrt(v + 1e-9), g, out=to.g_factor)
        m_factor = torch.mul(m * _M_UNIT, clamped_rsqrt(v * _V_UNIT), out=to.m_factor)
    if out is None:
        rows = [torch.stack([g, clipped, p]), m, rms.unsqueeze(0), m_root, root.unsqueeze(0)]
        rows += [g_factor, g_root.unsqueeze(0), m_factor]
        return torch.cat(rows if small is not None else [*rows, v, torch.rsqrt(v + 1e-8)])
    out.p.copy_(p)
    out.rms.copy_(rms)
    if small is None:
        out.v.copy_(v)
        torch.rsqrt(torch.add(v, 1e-8, out=out.v_root), out=out.v_root)
    return out.all


def _factored(net: Net, state: Mapping[str, Tensor], axes: tuple[int, int]) -> _Small:
    """The factors, and the first layer's part of what is constant along an axis.

    Those features are not laid out for every coordinate: they are multiplied by their weights here,
    once for a row or column.
    """
    w0, factor, bias = net.weights[0], [], []
    both = state["row"], state["col"]
    parts = zip(both, factors(*both, axes), axes[::-1], _FACTORED, strict=True)
    for second, its_factor, axis, i in parts:
        factor.append(_packed(its_factor.movedim(-1, 0)).unsqueeze(axis + 1))
        x = second.movedim(-1, 0).unsqueeze(axis + 1)
        x = torch.cat([x, torch.rsqrt(x + 1e-8)])
        x = normalize(x, tuple(range(2, x.ndim)), _EPS)
        w = torch.cat([w0.narrow(1, i, 3), w0.narrow(1, i + 6, 3)], 1)
        y = w.mT @ x.flatten(2).transpose(0, 1)
        bias.append(y.transpose(0, 1).reshape(-1, *x.shape[1:]))
    b0 = net.biases[0].mT.reshape(*bias[0].shape[:2], *(1,) * (bias[0].ndim - 2))
    return _Small(factor[0], factor[1], bias[0] + b0, bias[1])


def _columns(net: Net, p: Tensor) -> Tensor:
    """The first layer's weights of `_features`, ``(B, units, features)``."""
    w0 = net.weights[0]
    rows = [w0.narrow(1, s.start, s.stop - s.start) for s in _OWN]
    if p.ndim < 3:  # rows and columns are one and the same
        rows += [w0.narrow(1, i, 3) + w0.narrow(1, i + 3, 3) for i in (15, 21)]
    return torch.cat(rows, 1).mT


def _folded(net: Net, exp_mult: float) -> list[tuple[Tensor, Tensor]]:
    """The layers after the first, ``(B, out, in)``, the last with two outputs, one scaled."""
    layers = zip(net.weights[1:], net.biases[1:], strict=True)
    found = [(w.mT, b.unsqueeze(2)) for w, b in layers]
    w, b = (x.narrow(1, 0, 2) for x in found[-1])
    factor = w.new_tensor([[1.0], [exp_mult]])
    return [*found[:-1], (w * factor, b * factor)]


def _packed(x: Tensor) -> Tensor:
    """A contiguous copy (`.contiguous` itself asks for the library of the tensor's device)."""
    return x.clone(memory_format=torch.contiguous_format)


# -- memory of a tile --------------------------------------------------------------------------


class _Slots(NamedTuple):
    """Memory for `_features`: its parts by name."""

    all: Any
    g: Any
    clipped: Any
    p: Any
    m: Any
    rms: Any
    m_root: Any
    root: Any
    g_factor: Any
    g_root: Any
    m_factor: Any
    v: Any
    v_root: Any

    @classmethod
    def none(cls) -> _Slots:
        return cls(*(None,) * 13)

    @classmethod
    def of(cls, x: Tensor) -> _Slots:
        g, clipped, p, m, rms, m_root, root, g_factor, g_root, m_factor, v, v_root = (
            x[a:b] if b - a > 1 else x[a] for a, b in itertools.pairwise(_STARTS)
        )
        return cls(x, g, clipped, p, m, rms, m_root, root, g_factor, g_root, m_factor, v, v_root)


_STARTS = (0, 1, 2, 3, 6, 7, 10, 11, 14, 15, 18, 21, 24)


class _Memory:
    """Memory for one tile, used for all of them; the views of a shape are made once."""

    def __init__(self, like: Tensor, rows: int, net: Net, size: int) -> None:
        self.rows = rows
        self.units = [*(w.shape[2] for w in net.weights[:-1]), 2]
        self.flat_features = like.new_empty(rows * size)
        self.flat_layers = [like.new_empty(units * size) for units in self.units]
        self.by_shape: dict[tuple[int, ...], _Slots] = {}

    def features(self, shape: tuple[int, ...]) -> _Slots:
        if shape not in self.by_shape:
            flat = self.flat_features[: self.rows * math.prod(shape)]
            self.by_shape[shape] = _Slots.of(flat.view(self.rows, *shape))
        return self.by_shape[shape]

    def layers(self, tile: Tile) -> list[Tensor]:
        """``(leaves, units, n)`` of each layer."""
        count, n = tile.shape[0], math.prod(tile.shape[1:])
        pairs = zip(self.flat_layers, self.units, strict=True)
        return [flat[: count * units * n].view(count, units, n) for flat, units in pairs]
