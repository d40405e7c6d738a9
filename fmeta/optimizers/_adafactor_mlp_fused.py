"""`adafactor_mlp` in compiled passes: four over a tensor, each one loop without temporaries.

What the passes compute is what `fmeta.optimizers._adafactor_mlp_net` computes; see there for the
formulas. They are cut at the means over rows and columns and at the features' root mean squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta.optimizers._adafactor_mlp_net import (
    Decays,
    first_columns,
    leaf_factors,
    learned_decays,
    moment_names,
    second_moments,
)
from fmeta.optimizers._common import ema
from fmeta.optimizers._coordinate_net import EPS, Layers, layers_of, time_bias
from fmeta.optimizers._features import factored_axes
from fmeta.optimizers._fused import compiled, layer, sums_of_squares

__all__ = ["MOST_UNITS", "fused"]

Tree = Any

# Networks with wider layers are too long written out unit by unit.
MOST_UNITS = 8


def fused(
    th: Tree,
    p: Tensor,
    g: Tensor,
    h: Mapping[str, Tensor],
    initial: Decays,
    exp_mult: Any,
    factor: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``factor d exp(exp_mult e)`` and the new state, of a tensor of at least two axes."""
    decays = learned_decays(th, initial, p.dtype)
    names = moment_names(decays)
    axes = factored_axes(p.shape)
    means = compiled(_squared_means)(g, axes[1], axes[0])
    second = second_moments(h, None, means, decays)
    small = leaf_factors(th, second, decays, axes, range(p.ndim))
    assert small.col_factor is not None
    planes = compiled(_moments)(
        g,
        [h[name] for name in names],
        [*decays.momentum, *decays.rms],
        len(decays.momentum),
    )
    momenta, seconds = planes[: len(decays.momentum)], planes[len(decays.momentum) :]
    seen = (p, g, momenta, seconds, small.row_factor, small.col_factor)
    squares = torch.cat([x.reshape(1) for x in compiled(_feature_squares)(*seen)])
    columns = first_columns(th, decays, axes) * torch.rsqrt(squares / p.numel() + EPS)
    bias = small.row_bias + time_bias(th, h["count"], p, 0)
    layers = layers_of(th, exp_mult)
    scaled = p.new_full((), factor)  # a tensor: another number needs no other kernel
    delta = compiled(_steps)(scaled, columns, layers, bias, small.col_bias, *seen)
    new = dict(zip(names, planes, strict=True))
    return delta, {**new, **second, "count": h["count"] + 1}


# -- passes ------------------------------------------------------------------------------------


def _squared_means(g: Tensor, d0: int, d1: int) -> tuple[Tensor, Tensor]:
    square = g * g
    return square.mean(d0), square.mean(d1)


def _moments(g: Tensor, old: list[Tensor], decays: list[Tensor], momenta: int) -> list[Tensor]:
    values = [g] * momenta + [g * g] * (len(old) - momenta)
    return [ema(o, x, d) for o, x, d in zip(old, values, decays, strict=True)]


def _features(
    p: Tensor, g: Tensor, m: list[Tensor], v: list[Tensor], row: Tensor, col: Tensor
) -> list[Tensor]:
    """The features in the order of `first_columns`."""
    root = [torch.rsqrt(x + 1e-6) for x in v]
    factor = [r * c for r, c in zip(row.unbind(0), col.unbind(0), strict=True)]
    over_root = [x * root[min(i, len(root) - 1)] for i, x in enumerate(m)]
    by_factor = [x * f for x, f in zip(m, factor, strict=True)]
    return [g, p, *m, *v, *over_root, *root, *(f * g for f in factor), *by_factor]


def _feature_squares(*seen: Any) -> list[Tensor]:
    return sums_of_squares(_features(*seen), range(seen[0].ndim))


def _steps(
    factor: Tensor,
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
    return factor * direction * torch.exp(magnitude)
