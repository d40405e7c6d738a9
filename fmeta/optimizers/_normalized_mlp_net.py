"""The network of `normalized_mlp`: features of one tensor, and the direction it makes of them.

The formulas are written once; `direction` runs them on a whole tensor, `tiled_direction` tile by
tile in memory that is used again, where no derivative is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._common import ema
from fmeta.optimizers._features import (
    Tile,
    clamped_rsqrt,
    factored_axes,
    factors,
    normalize,
    split,
    stacked_ema,
    sum_of_squares,
    tiled_means,
)

__all__ = ["DECAYS", "MOMENTS", "TILE", "direction", "normalized_delta", "tiled_direction"]

Tree = Any

DECAYS = (0.9, 0.99, 0.999)  # of the momenta, and of the factored second moments
_RMS_DECAY = 0.95
MOMENTS = ("m0", "m1", "m2", "rms")

# Coordinates a tile, where no derivative is recorded: the features of a tile stay in cache.
TILE = 2**16
# Matrices at least this large get tiles of their own, with their scales folded into the weights.
_ALONE = 2**11


def matrix_axes(p: Tensor) -> tuple[int, ...]:
    return (-2, -1)[-p.ndim :] if p.ndim else ()


def direction(
    th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's direction for a whole tensor, ``(*leaf)``, and the new state."""
    g = _clamped(g)
    square = g * g
    new = _moments(g, square, h)
    if p.ndim < 2:
        new["v"] = stacked_ema(h["v"], square, DECAYS)
        x = _features(p, g, new, clamped_rsqrt(new["v"] + 1e-9).movedim(-1, 0), None)
        w, bias = th["w0"].narrow(0, 0, 15).mT, th["b0"].reshape(8, *(1,) * p.ndim)
    else:
        axes = factored_axes(p.shape)
        new |= _second_moments(h, square.mean(axes[1]), square.mean(axes[0]))
        row_factor, col_factor, row_bias, col_bias = _factored(th, new, axes)
        x = _features(p, g, new, row_factor, col_factor)
        w, bias = _main_columns(th), row_bias + col_bias
    w, x = _scaled(w, x, _scale(sum_of_squares(x, matrix_axes(p)), p))
    out = _network(
        _layers(th), w, bias.expand(8, *p.shape).reshape(8, -1), x.reshape(x.shape[0], -1)
    )
    return out.reshape(p.shape), new


def tiled_direction(
    th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, tile by tile in memory that is used again and again; only without derivatives.

    Two passes: the features' sums of squares, then the features once more and the network. To
    store the 18 features in between would cost more than to make them of six tensors again.
    """
    axes = factored_axes(p.shape)
    new = {name: torch.empty_like(p) for name in MOMENTS}
    new |= _second_moments(
        h, *tiled_means(lambda part, out: _clamped(part, out).square_(), g, axes, size)
    )
    small = _factored(th, new, axes)
    tiles = list(split(p.shape, size, alone=_ALONE))
    memory = _Memory(p, max(math.prod(tile.shape) for tile in tiles))

    def features(tile: Tile, values: dict[str, Tensor], g: Tensor, x: _Slots) -> Tensor:
        row_factor, col_factor = (tile.of_broadcast(s) for s in small[:2])
        return _features(tile.of(p), g, values, row_factor, col_factor, x)

    squares = p.new_zeros(18, *p.shape[:-2], 1, 1)
    for tile in tiles:
        x, (square, _) = memory.features(tile.shape), memory.layers(tile.shape)
        part = _clamped(tile.of(g), out=x.g)
        square = torch.mul(part, part, out=square[0].view(tile.shape))
        values = {name: tile.of(new[name]) for name in MOMENTS}
        _moments(part, square, {name: tile.of(h[name]) for name in MOMENTS}, values)
        sums = sum_of_squares(features(tile, values, part, x), (-2, -1), fused=True)
        tile.of_broadcast(squares).add_(sums)

    scale, columns, layers = _scale(squares, p), _main_columns(th), _layers(th)
    step = torch.empty_like(p)
    for tile in tiles:
        x, (first, second) = memory.features(tile.shape), memory.layers(tile.shape)
        part = _clamped(tile.of(g), out=x.g)
        made = features(tile, {name: tile.of(new[name]) for name in MOMENTS}, part, x)
        w, made = _scaled(columns, made, tile.of_broadcast(scale), own=True)
        row_bias, col_bias = (tile.of_broadcast(s) for s in small[2:])
        torch.add(row_bias, col_bias, out=first.view(8, *tile.shape))
        out = _network(layers, w, first, made.flatten(1), out=(first, second))
        tile.of(step).copy_(out.view(tile.shape))
    return step, new


def normalized_delta(step: Tensor, p: Tensor, lr: Any, weight_decay: Any, own: bool) -> Tensor:
    """``-lr * (step / rms(step) + weight_decay * p)``, in the memory of ``step`` if that is own."""
    factor = -lr * _scale(sum_of_squares(step, matrix_axes(p), fused=own), p)
    delta = step.mul_(factor) if own else step * factor
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return delta
    rate = -lr * weight_decay
    if own and isinstance(rate, (int, float)):
        return delta.add_(p, alpha=rate)
    return delta + rate * p


# -- formulas ----------------------------------------------------------------------------------


def _clamped(g: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.clamp(g, -1000.0, 1000.0, out=out)


def _moments(
    g: Tensor, square: Tensor, h: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Momenta and second moment after the clamped gradient ``g`` and its square."""
    slots = out or dict.fromkeys(MOMENTS)
    new = {n: ema(h[n], g, d, slots[n]) for n, d in zip(MOMENTS, DECAYS, strict=False)}
    return {**new, "rms": ema(h["rms"], square, _RMS_DECAY, slots["rms"])}


def _second_moments(h: Mapping[str, Tensor], row: Tensor, col: Tensor) -> dict[str, Tensor]:
    """Factored second moments after the means of the squared gradient over one axis each."""
    return {
        "row": stacked_ema(h["row"], row + 1e-30, DECAYS),
        "col": stacked_ema(h["col"], col + 1e-30, DECAYS),
    }


def _features(
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor],
    row_factor: Tensor,
    col_factor: Tensor | None,
    out: _Slots | None = None,
) -> Tensor:
    """The features that differ from coordinate to coordinate, feature first.

    Args:
        p, g: ``(*shape)``, g clamped.
        state: ``m0``, ``m1``, ``m2``, ``rms`` after this gradient.
        row_factor, col_factor: ``(3, *)``, to be broadcast over the shape; without ``col_factor``
            the first is the factor of a tensor that is not factored.
        out: memory of ``(18, *shape)``, with ``g`` in its first row.

    Returns:
        ``(18, *shape)``, or ``(15, *shape)`` without ``col_factor``: rows 0 to 14 and 27 to 29 of
        ``w0``.
    """
    rms, momenta = state["rms"], [state[name] for name in MOMENTS[:3]]
    to = out or _Slots.none()
    clipped = torch.clamp(g, -0.1, 0.1, out=to.clipped)
    m = torch.stack(momenta, out=to.m)
    root = torch.rsqrt(torch.add(rms, 1e-8, out=to.root), out=to.root)
    m_root = torch.mul(m, root, out=to.m_root)
    g_root = torch.mul(g, root, out=to.g_root)
    factor, m_factor = row_factor, None
    if col_factor is not None:
        factor = torch.mul(row_factor, col_factor, out=to.g_factor)
        m_factor = torch.mul(m, factor, out=to.m_factor)
    g_factor = torch.mul(factor, g, out=to.g_factor)
    if out is not None:
        out.p.copy_(p)
        out.rms.copy_(rms)
        return out.all
    rows = [torch.stack([g, clipped, p]), m, rms.unsqueeze(0), m_root, root.unsqueeze(0), g_factor]
    return torch.cat([*rows, g_root.unsqueeze(0), *([] if m_factor is None else [m_factor])])


def _factored(
    th: Tree, state: Mapping[str, Tensor], axes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What depends on the factored second moments alone, each with size 1 on the axis it lacks.

    The features that are constant along an axis are not laid out for every coordinate: their part
    of the first layer is computed here, once for a row or column.

    Returns:
        ``(row_factor, col_factor, row_bias, col_bias)``: ``(3, *)`` and ``(8, *)``, ``b0`` being
        part of ``row_bias``.
    """
    w0, factor, bias = th["w0"], [], []
    both = state["row"], state["col"]
    parts = zip(both, factors(*both, axes), axes[::-1], (15, 18), strict=True)
    for second, its_factor, axis, i in parts:
        factor.append(_packed(its_factor.movedim(-1, 0)).unsqueeze(axis + 1))
        x = second.movedim(-1, 0).unsqueeze(axis + 1)
        x = normalize(torch.cat([x, torch.rsqrt(x + 1e-8)]), (-2, -1))
        w = torch.cat([w0.narrow(0, i, 3), w0.narrow(0, i + 6, 3)])
        bias.append((w.mT @ x.flatten(1)).reshape(8, *x.shape[1:]))
    b0 = th["b0"].reshape(8, *(1,) * (bias[0].ndim - 1))
    return factor[0], factor[1], bias[0] + b0, bias[1]


def _packed(x: Tensor) -> Tensor:
    """A contiguous copy (`.contiguous` itself asks for the library of the tensor's device)."""
    return x.clone(memory_format=torch.contiguous_format)


def _scale(squares: Tensor, p: Tensor) -> Tensor:
    """``1 / rms`` from sums of squares over the matrix axes of ``p``."""
    return torch.rsqrt(squares / math.prod(p.shape[-2:]) + 1e-9)


def _main_columns(th: Tree) -> Tensor:
    """The first layer's weights of `_features`, ``(8, 18)``."""
    return torch.cat([th["w0"].narrow(0, 0, 15), th["w0"].narrow(0, 27, 3)]).mT


def _scaled(w: Tensor, x: Tensor, scale: Tensor, own: bool = False) -> tuple[Tensor, Tensor]:
    """``w, x`` such that ``w @ x`` has the features scaled; by the weights if one scale is enough.

    Args:
        w: ``(8, features)``.
        x: ``(features, *shape)``, overwritten if ``own``.
        scale: ``(features, *)``, to be broadcast over the shape.
    """
    if scale.numel() == scale.shape[0]:
        return w * scale.flatten(), x
    return w, (x.mul_(scale) if own else x * scale)


def _layers(th: Tree) -> tuple[Tensor, ...]:
    """The layers after the first, feature first, the last with the direction alone."""
    last, bias = _packed(th["w2"].select(1, 0)), th["b2"].select(0, 0)
    return (th["w1"].mT, th["b1"].unsqueeze(1), last, bias)


def _network(
    layers: tuple[Tensor, ...],
    w: Tensor,
    bias: Tensor,
    x: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The first output of the network, ``(n,)``.

    Args:
        layers: of `_layers`.
        w: ``(8, features)``.
        bias: of the first layer, ``(8, n)``.
        x: ``(features, n)``.
        out: memory of the two layers, each ``(8, n)``.
    """
    first, second = out or (None, None)
    rest = None if first is None else first[0]
    w1, b1, w2, b2 = layers
    relu = torch.relu if out is None else torch.relu_
    x = relu(torch.addmm(bias, w, x, out=first))
    x = relu(torch.addmm(b1, w1, x, out=second))
    return torch.add(torch.mv(x.mT, w2, out=rest), b2, out=rest)


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

    @classmethod
    def none(cls) -> _Slots:
        return cls(*(None,) * 11)

    @classmethod
    def of(cls, x: Tensor) -> _Slots:
        g, clipped, p, *_ = one = x.unbind(0)
        parts = (x[3:6], one[6], x[7:10], one[10], x[11:14], one[14], x[15:])
        return cls(x, g, clipped, p, *parts)


class _Memory:
    """Memory for one tile, used for all of them; the views of a shape are made once."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.flat_features = like.new_empty(18 * size)
        self.flat_layers = like.new_empty(2 * 8 * size)
        self.by_shape: dict[tuple[int, ...], _Slots] = {}

    def features(self, shape: tuple[int, ...]) -> _Slots:
        if shape not in self.by_shape:
            flat = self.flat_features[: 18 * math.prod(shape)]
            self.by_shape[shape] = _Slots.of(flat.view(18, *shape))
        return self.by_shape[shape]

    def layers(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        n = math.prod(shape)
        first, second = self.flat_layers[: 16 * n].view(2, 8, n)
        return first, second
