"""The network of `normalized_mlp`: features of one tensor, and the direction it makes of them.

Tile by tile, where no derivative is recorded: `fmeta.optimizers._normalized_mlp_tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._common import ema
from fmeta.optimizers._features import (
    clamped_rsqrt,
    factored_axes,
    normalize,
    stacked_ema,
    sum_of_squares,
)
from fmeta.optimizers._layout import Layout

__all__ = [
    "DECAYS",
    "MOMENTS",
    "RMS_DECAY",
    "Axes",
    "Sides",
    "axes_in",
    "axes_of",
    "clamped",
    "direction",
    "factored_features",
    "layers_of",
    "main_columns",
    "normalized_delta",
    "of_sides",
    "second_moments",
    "side_columns",
    "unfactored",
]

Tree = Any

DECAYS = (0.9, 0.99, 0.999)  # of the momenta, and of the factored second moments
RMS_DECAY = 0.95
MOMENTS = ("m0", "m1", "m2", "rms")


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


def axes_in(layout: Layout | None, axes: Axes) -> Axes:
    """The same axes in the working order."""
    if layout is None:
        return axes
    at, (matrix, factored) = layout.order.index, axes
    pair = None if factored is None else (at(factored[0]), at(factored[1]))
    return Axes(tuple(at(i) for i in matrix), pair)


class Sides(NamedTuple):
    """What is known of rows and columns alone: size 1 on the axis it lacks.

    The features that are constant along an axis are not laid out for every coordinate: their part
    of the first layer is computed once for a row or column.

    Attributes:
        row_factor, col_factor: ``(3, *)``, whose product stands for ``1 / sqrt`` of the second
            moment.
        row_bias, col_bias: parts of the first layer, ``(8, *)``, ``b0`` being part of the first.
    """

    row_factor: Tensor
    col_factor: Tensor
    row_bias: Tensor
    col_bias: Tensor


def direction(
    th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], axes: Axes
) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's direction for a whole tensor, of the shape of ``p``, and the new state."""
    g = clamped(g)
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
        layers_of(th), w, bias.expand(8, *p.shape).reshape(8, -1), x.reshape(x.shape[0], -1)
    )
    return out.reshape(p.shape), new


def normalized_delta(step: Tensor, p: Tensor, lr: Any, weight_decay: Any, axes: Axes) -> Tensor:
    """``-lr * (step / rms(step) + weight_decay * p)``."""
    delta = step * (-lr * _scale(sum_of_squares(step, axes.matrix), p, axes))
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return delta
    return delta + -lr * weight_decay * p


# -- formulas --------------------------------------------------------------------------------------


def clamped(g: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient as the rule sees it."""
    return torch.clamp(g, -1000.0, 1000.0, out=out)


def _moments(g: Tensor, square: Tensor, h: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Momenta and second moment after the clamped gradient ``g`` and its square."""
    new = {n: ema(h[n], g, d) for n, d in zip(MOMENTS, DECAYS, strict=False)}
    return {**new, "rms": ema(h["rms"], square, RMS_DECAY)}


def second_moments(h: Mapping[str, Tensor], row: Tensor, col: Tensor) -> dict[str, Tensor]:
    """Factored second moments after the means of the squared gradient over one axis each."""
    return {
        "row": stacked_ema(h["row"], row + 1e-30, DECAYS),
        "col": stacked_ema(h["col"], col + 1e-30, DECAYS),
    }


def _features(
    p: Tensor, g: Tensor, state: Mapping[str, Tensor], row_factor: Tensor, col_factor: Tensor | None
) -> Tensor:
    """The features that differ from coordinate to coordinate, feature first.

    Args:
        p, g: ``(*shape)``, g clamped.
        state: ``m0``, ``m1``, ``m2``, ``rms`` after this gradient.
        row_factor, col_factor: ``(3, *)``, to be broadcast over the shape; without ``col_factor``
            the first is the factor of a tensor that is not factored.

    Returns:
        ``(18, *shape)``, or ``(15, *shape)`` without ``col_factor``: rows 0 to 14 and 27 to 29 of
        ``w0``.
    """
    m, rms = torch.stack([state[name] for name in MOMENTS[:3]]), state["rms"]
    root = torch.rsqrt(rms + 1e-8)
    factor = row_factor if col_factor is None else row_factor * col_factor
    rows = [torch.stack([g, torch.clamp(g, -0.1, 0.1), p]), m, rms.unsqueeze(0), m * root]
    rows += [root.unsqueeze(0), factor * g, (g * root).unsqueeze(0)]
    return torch.cat(rows if col_factor is None else [*rows, m * factor])


def factored_features(th: Tree, state: Mapping[str, Tensor], axes: Axes) -> Sides:
    """`of_sides` of a state."""
    assert axes.factored is not None
    return of_sides(side_columns(th), th["b0"], *unfactored(state, axes.factored[::-1]), axes)


def unfactored(state: Mapping[str, Tensor], lacking: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Views of ``row`` and ``col``, decays first, with size 1 on the axis they lack.

    Args:
        lacking: d0 and d1.
    """
    row, col = (state[name].movedim(-1, 0) for name in ("row", "col"))
    return row.unsqueeze(lacking[0] + 1), col.unsqueeze(lacking[1] + 1)


def of_sides(
    columns: tuple[Tensor, Tensor], b0: Tensor, row: Tensor, col: Tensor, axes: Axes
) -> Sides:
    """Factors of rows and columns, and what their features give in the first layer.

    Args:
        columns: of `side_columns`.
        row, col: of `unfactored`.
    """
    assert axes.factored is not None
    share = row / (row.mean(axes.factored[0] + 1, keepdim=True) + 1e-9)
    biases = []
    for x, w in zip((row, col), columns, strict=True):
        y = normalize(torch.cat([x, torch.rsqrt(x + 1e-8)]), _after_features(axes))
        biases.append((w @ y.flatten(1)).reshape(8, *y.shape[1:]))
    bias = biases[0] + b0.reshape(8, *(1,) * (row.ndim - 1))
    return Sides(_packed(clamped_rsqrt(share)), _packed(clamped_rsqrt(col)), bias, biases[1])


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


def side_columns(th: Tree) -> tuple[Tensor, Tensor]:
    """The first layer's weights of rows and of columns, each ``(8, 6)``."""
    row, col, row_root, col_root = th["w0"].narrow(0, 15, 12).split(3)
    return torch.cat([row, row_root]).mT, torch.cat([col, col_root]).mT


def _scaled(w: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``w, x`` such that ``w @ x`` has the features scaled; by the weights if one scale is enough.

    Args:
        w: ``(8, features)``.
        x: ``(features, *shape)``.
        scale: ``(features, *)``, to be broadcast over the shape.
    """
    if scale.numel() == scale.shape[0]:
        return w * scale.flatten(), x
    return w, x * scale


def layers_of(th: Tree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layers after the first, feature first, the last with the direction alone."""
    last, bias = _packed(th["w2"].select(1, 0)), th["b2"].select(0, 0)
    return (th["w1"].mT, th["b1"].unsqueeze(1), last, bias)


def _network(layers: tuple[Tensor, ...], w: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """The first output of the network, ``(n,)``.

    Args:
        layers: of `layers_of`.
        w: ``(8, features)``.
        bias: of the first layer, ``(8, n)``.
        x: ``(features, n)``.
    """
    w1, b1, w2, b2 = layers
    x = torch.relu(torch.addmm(bias, w, x))
    x = torch.relu(torch.addmm(b1, w1, x))
    return torch.mv(x.mT, w2) + b2
