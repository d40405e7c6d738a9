"""`adafactor_mlp` in compiled passes: four over a tensor, each one loop without temporaries.

What the passes compute is what `fmeta.optimizers._adafactor_mlp_net` computes; see there for the
formulas. They are cut at the means over rows and columns and at the features' root mean squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta.optimizers._adafactor_mlp_net import Net, of_sides, planes, second_moments
from fmeta.optimizers._coordinate_net import EPS, Layers, time_bias
from fmeta.optimizers._features import factored_axes
from fmeta.optimizers._fused import compiled, layer, sums_of_squares

__all__ = ["MOST_UNITS", "fused"]

# Networks with wider layers are too long written out unit by unit.
MOST_UNITS = 8


def fused(
    net: Net, p: Tensor, g: Tensor, h: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-step_mult d exp(exp_mult e)`` and the new state, of a tensor of at least two axes."""
    names, n, axes = planes(net), len(net.momentum), factored_axes(p.shape)
    row, col = compiled(_squared_means)(g, axes[1], axes[0])
    second = second_moments(net, h, {"row": row, "col": col})
    sides = of_sides(net, second, axes, 0)
    new = compiled(_moments)(g, [h[name] for name in names], [*net.momentum, *net.rms], n)
    seen = (p, g, new[:n], new[n:], sides.row_factor, sides.col_factor)
    squares = torch.cat([x.reshape(1) for x in compiled(_feature_squares)(*seen)])
    columns = net.columns * torch.rsqrt(squares / p.numel() + EPS)
    bias = sides.row_bias + time_bias(net.time, h["count"], p, 0)
    delta = compiled(_steps)(columns, net.layers, bias, sides.col_bias, *seen)
    return delta, {**dict(zip(names, new, strict=True)), **second, "count": h["count"] + 1}


# -- passes ------------------------------------------------------------------------------------


def _squared_means(g: Tensor, d0: int, d1: int) -> tuple[Tensor, Tensor]:
    square = g * g
    return square.mean(d0), square.mean(d1)


def _moments(g: Tensor, old: list[Tensor], weights: list[Tensor], momenta: int) -> list[Tensor]:
    values = [g] * momenta + [g * g] * (len(old) - momenta)
    return [torch.lerp(o, x, w) for o, x, w in zip(old, values, weights, strict=True)]


def _features(
    p: Tensor, g: Tensor, m: list[Tensor], v: list[Tensor], row: Tensor, col: Tensor
) -> list[Tensor]:
    """The features in the order of `Net.columns`."""
    root = [torch.rsqrt(x + 1e-6) for x in v]
    factor = [r * c for r, c in zip(row.unbind(0), col.unbind(0), strict=True)]
    over_root = [x * root[min(i, len(root) - 1)] for i, x in enumerate(m)]
    by_factor = [x * f for x, f in zip(m, factor, strict=True)]
    return [g, p, *m, *v, *over_root, *root, *(f * g for f in factor), *by_factor]


def _feature_squares(*seen: Any) -> list[Tensor]:
    return sums_of_squares(_features(*seen), range(seen[0].ndim))


def _steps(
    columns: Tensor,
    layers: Layers,
    row_bias: Tensor,
    col_bias: Tensor,
    *seen: Any,
) -> Tensor:
    x = layer(_features(*seen), columns, [row_bias[j] + col_bias[j] for j in range(len(columns))])
    for w, b in layers:
        x = layer([torch.relu(u) for u in x], w, list(b.squeeze(1).unbind(0)))
    direction, magnitude = x
    return direction * torch.exp(magnitude)
