"""The network of `normalized_mlp`: features of one tensor, and the direction it makes of them.

The formulas are written once; `direction` runs them on a whole tensor, `tiled_delta` tile by tile
in memory that is used again, where no derivative is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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

__all__ = [
    "DECAYS",
    "MOMENTS",
    "RMS_DECAY",
    "TILE",
    "Axes",
    "axes_of",
    "direction",
    "factored_features",
    "main_columns",
    "normalized_delta",
    "second_moments",
    "squared_means",
    "tiled_delta",
]

Tree = Any

DECAYS = (0.9, 0.99, 0.999)  # of the momenta, and of the factored second moments
RMS_DECAY = 0.95
MOMENTS = ("m0", "m1", "m2", "rms")

# Coordinates a tile, where no derivative is recorded: the features of a tile stay in cache.
TILE = 2**16
# Matrices at least this large get tiles of their own, with their scales folded into the weights.
_ALONE = 2**11


class Axes(NamedTuple):
    """Which axes of a tensor (or of a stack of tensors) a rule knows.

    Attributes:
        matrix: over which features are normalised: the last two of a leaf.
        factored: ``(d1, d0)`` of the second moments; None for fewer than two axes.
    """

    matrix: tuple[int, ...]
    factored: tuple[int, int] | None


def axes_of(shape: tuple[int, ...], batch: int = 0) -> Axes:
    """The axes of leaves of one shape, stacked along ``batch`` leading axes."""
    n = len(shape)
    matrix = tuple(range(max(n - 2, batch), n))
    if n - batch < 2:
        return Axes(matrix, None)
    d1, d0 = factored_axes(shape[batch:])
    return Axes(matrix, (d1 + batch, d0 + batch))


def direction(
    th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], axes: Axes
) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's direction for a whole tensor, of the shape of ``p``, and the new state."""
    g = _clamped(g)
    square = g * g
    new = _moments(g, square, h)
    if axes.factored is None:
        new["v"] = stacked_ema(h["v"], square, DECAYS)
        x = _features(p, g, new, clamped_rsqrt(new["v"] + 1e-9).movedim(-1, 0), None)
        w, bias = th["w0"].narrow(0, 0, 15).mT, th["b0"].reshape(8, *(1,) * p.ndim)
    else:
        d1, d0 = axes.factored
        new |= second_moments(h, square.mean(d0), square.mean(d1))
        row_factor, col_factor, row_bias, col_bias = factored_features(th, new, axes)
        x = _features(p, g, new, row_factor, col_factor)
        w, bias = main_columns(th), row_bias + col_bias
    w, x = _scaled(w, x, _scale(sum_of_squares(x, _after_features(axes)), p, axes))
    out = _network(
        _layers(th), w, bias.expand(8, *p.shape).reshape(8, -1), x.reshape(x.shape[0], -1)
    )
    return out.reshape(p.shape), new


def squared_means(g: Tensor, axes: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Means of the clamped gradient's square over d0 and over d1 of ``axes = (d1, d0)``."""
    return tiled_means(lambda part, out: _clamped(part, out).square_(), g, axes, size)


def normalized_delta(step: Tensor, p: Tensor, lr: Any, weight_decay: Any, axes: Axes) -> Tensor:
    """``-lr * (step / rms(step) + weight_decay * p)``."""
    delta = step * (-lr * _scale(sum_of_squares(step, axes.matrix), p, axes))
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return delta
    return delta + -lr * weight_decay * p


def tiled_delta(
    th: Tree,
    p: Tensor,
    g: Tensor,
    h: dict[str, Tensor],
    axes: Axes,
    means: tuple[Tensor, Tensor],
    lr: Any,
    weight_decay: Any,
    post: Callable[[Tensor], Tensor] | None = None,
    *,
    size: int,
    own: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`direction` and `normalized_delta`, tile by tile in memory that is used again and again.

    Two passes: the features' sums of squares, then the features once more and the network. To
    store the 18 features in between would cost more than to make them of six tensors again. Only
    without derivatives.

    Args:
        means: of the squared gradient, by `squared_means`.
        post: what is done to the direction before it is normalised.
        size: coordinates a tile.
        own: whether the state's memory may be used for the new one.
    """
    new = {name: h[name] if own else p.new_empty(p.shape) for name in MOMENTS}
    new |= second_moments(h, *means)
    small = factored_features(th, new, axes)
    tiles = list(split(p.shape, size, axes.matrix, alone=_ALONE))
    memory = _Memory(p, max(math.prod(tile.shape) for tile in tiles))
    after = _after_features(axes)

    def features(tile: Tile, values: dict[str, Tensor], g: Tensor, x: _Slots) -> Tensor:
        row_factor, col_factor = (tile.of_broadcast(s) for s in small[:2])
        return _features(tile.of(p), g, values, row_factor, col_factor, x)

    squares = p.new_zeros(18, *(1 if i in axes.matrix else n for i, n in enumerate(p.shape)))
    for tile in tiles:
        x, (square, _) = memory.features(tile.shape), memory.layers(tile.shape)
        part = _clamped(tile.of(g), out=x.g)
        square = torch.mul(part, part, out=square[0].view(tile.shape))
        values = {name: tile.of(new[name]) for name in MOMENTS}
        _moments(part, square, {name: tile.of(h[name]) for name in MOMENTS}, values)
        tile.of_broadcast(squares).add_(
            sum_of_squares(features(tile, values, part, x), after, fused=True)
        )

    count = math.prod([p.shape[i] for i in axes.matrix])
    scale = squares.div_(count).add_(1e-9).rsqrt_()
    columns, layers = main_columns(th), _layers(th)
    # With whole matrices in every tile the direction's rms is known there.
    whole = post is None and all(tile.shape[i] == p.shape[i] for tile in tiles for i in axes.matrix)
    step, squares = torch.empty_like(p), p.new_zeros(squares.shape[1:])
    for tile in tiles:
        x, (first, second) = memory.features(tile.shape), memory.layers(tile.shape)
        part = _clamped(tile.of(g), out=x.g)
        made = features(tile, {name: tile.of(new[name]) for name in MOMENTS}, part, x)
        w, made = _scaled(columns, made, tile.of_broadcast(scale), own=True)
        row_bias, col_bias = (tile.of_broadcast(s) for s in small[2:])
        torch.add(row_bias, col_bias, out=first.view(8, *tile.shape))
        out = _network(layers, w, first, made.flatten(1), out=(first, second)).view(tile.shape)
        if post is None:
            sums = sum_of_squares(out, axes.matrix, fused=True)
            if whole:
                out.mul_(sums.div_(count).add_(1e-9).rsqrt_())
            else:
                tile.of_broadcast(squares.unsqueeze(0)).add_(sums.unsqueeze(0))
        tile.of(step).copy_(out)
    if post is not None:
        step = post(step)
        squares = sum_of_squares(step, axes.matrix)
    delta = step.mul_(-lr if whole else -lr * _scale(squares, p, axes))
    rate = -lr * weight_decay
    if isinstance(rate, Tensor):
        return delta.addcmul_(rate, p), new
    return (delta.add_(p, alpha=rate) if rate else delta), new


# -- formulas ----------------------------------------------------------------------------------


def _clamped(g: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.clamp(g, -1000.0, 1000.0, out=out)


def _moments(
    g: Tensor, square: Tensor, h: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Momenta and second moment after the clamped gradient ``g`` and its square."""
    slots = out or dict.fromkeys(MOMENTS)
    new = {n: ema(h[n], g, d, slots[n]) for n, d in zip(MOMENTS, DECAYS, strict=False)}
    return {**new, "rms": ema(h["rms"], square, RMS_DECAY, slots["rms"])}


def second_moments(h: Mapping[str, Tensor], row: Tensor, col: Tensor) -> dict[str, Tensor]:
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


def factored_features(
    th: Tree, state: Mapping[str, Tensor], axes: Axes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What depends on the factored second moments alone, each with size 1 on the axis it lacks.

    The features that are constant along an axis are not laid out for every coordinate: their part
    of the first layer is computed here, once for a row or column.

    Returns:
        ``(row_factor, col_factor, row_bias, col_bias)``: ``(3, *)`` and ``(8, *)``, ``b0`` being
        part of ``row_bias``.
    """
    assert axes.factored is not None
    w0, factor, bias = th["w0"], [], []
    both = state["row"], state["col"]
    parts = zip(both, factors(*both, axes.factored), axes.factored[::-1], (15, 18), strict=True)
    for second, its_factor, axis, i in parts:
        factor.append(_packed(its_factor.movedim(-1, 0)).unsqueeze(axis + 1))
        x = second.movedim(-1, 0).unsqueeze(axis + 1)
        x = normalize(torch.cat([x, torch.rsqrt(x + 1e-8)]), _after_features(axes))
        w = torch.cat([w0.narrow(0, i, 3), w0.narrow(0, i + 6, 3)])
        bias.append((w.mT @ x.flatten(1)).reshape(8, *x.shape[1:]))
    b0 = th["b0"].reshape(8, *(1,) * (bias[0].ndim - 1))
    return factor[0], factor[1], bias[0] + b0, bias[1]


def _packed(x: Tensor) -> Tensor:
    """A contiguous copy (`.contiguous` itself asks for the library of the tensor's device)."""
    return x.clone(memory_format=torch.contiguous_format)


def _after_features(axes: Axes) -> tuple[int, ...]:
    """The matrix axes of ``(features, *shape)``."""
    return tuple(i + 1 for i in axes.matrix)


def _scale(squares: Tensor, p: Tensor, axes: Axes) -> Tensor:
    """``1 / rms`` from sums of squares over the matrix axes of ``p``."""
    return torch.rsqrt(squares / math.prod([p.shape[i] for i in axes.matrix]) + 1e-9)


def main_columns(th: Tree) -> Tensor:
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
