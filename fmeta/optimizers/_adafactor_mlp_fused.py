"""`adafactor_mlp` in compiled passes: three over a tensor, each without temporaries.

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
from fmeta.optimizers._fused import compiled, layer, of_one_order, one_loop, sums_of_squares

__all__ = ["MOST_UNITS", "features", "fused"]

# Networks with wider layers are too long written out unit by unit.
MOST_UNITS = 8


def fused(
    net: Net, p: Tensor, g: Tensor, h: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-step_mult d exp(exp_mult e)`` and the new state, of a tensor of at least two axes."""
    names, n, axes = planes(net), len(net.momentum), factored_axes(p.shape)
    row, col = compiled(_squared_means)(g, axes[1], axes[0])
    second = second_moments(net, h, {"row": row, "col": col})
    bias = time_bias(net.time, h["count"], p, 0)
    sides = of_one_order(of_sides(net, second, axes, 0), axes)
    row_factor, col_factor, row_bias, col_bias = sides
    zeros = one_loop(row_factor[0], col_factor[0])
    old, weights = [h[name] for name in names], [*net.momentum, *net.rms]
    seen = (row_factor, col_factor, zeros, p, g)
    new, sums = compiled(_moments_and_squares)(old, weights, n, *seen)
    squares = torch.cat([x.reshape(1) for x in sums])
    columns = net.columns * torch.rsqrt(squares / p.numel() + EPS)
    delta = compiled(_steps)(columns, net.layers, row_bias + bias, col_bias, new, n, *seen)
    return delta, {**dict(zip(names, new, strict=True)), **second, "count": h["count"] + 1}


# -- passes ------------------------------------------------------------------------------------


def _squared_means(g: Tensor, d0: int, d1: int) -> tuple[Tensor, Tensor]:
    square = g * g
    return square.mean(d0), square.mean(d1)


def _moments_and_squares(
    old: list[Tensor], weights: list[Tensor], momenta: int, *seen: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The new moments, and the sums of squares of the features."""
    row, col, zeros, p, g = seen
    g = g + (zeros[0] + zeros[1])
    values = [g] * momenta + [g * g] * (len(old) - momenta)
    new = [torch.lerp(o, x, w) for o, x, w in zip(old, values, weights, strict=True)]
    return new, sums_of_squares(_features(new, momenta, row, col, zeros, p, g), range(p.ndim))


def _features(
    moments: list[Tensor],
    momenta: int,
    row: Tensor,
    col: Tensor,
    zeros: tuple[Tensor, Tensor],
    p: Tensor,
    g: Tensor,
) -> list[Tensor]:
    zero = zeros[0] + zeros[1]
    p, *moments = (x + zero for x in (p, *moments))
    return features(moments, momenta, row, col, p, g)


def features(
    moments: list[Tensor], momenta: int, row: Tensor, col: Tensor, p: Tensor, g: Tensor
) -> list[Tensor]:
    """The features in the order of `Net.columns`."""
    m, v = moments[:momenta], moments[momenta:]
    root = [torch.rsqrt(x + 1e-6) for x in v]
    factor = [r * c for r, c in zip(row.unbind(0), col.unbind(0), strict=True)]
    over_root = [x * root[min(i, len(root) - 1)] for i, x in enumerate(m)]
    by_factor = [x * f for x, f in zip(m, factor, strict=True)]
    return [g, p, *m, *v, *over_root, *root, *(f * g for f in factor), *by_factor]


def _steps(
    columns: Tensor,
    layers: Layers,
    row_bias: Tensor,
    col_bias: Tensor,
    moments: list[Tensor],
    momenta: int,
    *seen: Any,
) -> Tensor:
    zero = seen[2][0] + seen[2][1]
    bias = [r + c for r, c in zip(row_bias.unbind(0), col_bias.unbind(0), strict=True)]
    x = layer(_features(moments, momenta, *seen), columns, bias)
    for w, b in layers:
        x = layer([torch.relu(u) for u in x], w, [y + zero for y in b.squeeze(1).unbind(0)])
    direction, magnitude = x
    return direction * torch.exp(magnitude)
