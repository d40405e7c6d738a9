"""`normalized_mlp` in compiled passes: five over a tensor, each one loop without temporaries.

What the passes compute is what `fmeta.optimizers._normalized_mlp_net` computes; see there for the
formulas. They are cut at the means over rows and columns, at the features' root mean squares, and
at that of the direction.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta.optimizers._common import ema
from fmeta.optimizers._fused import compiled, layer, sums_of_squares
from fmeta.optimizers._normalized_mlp_net import (
    DECAYS,
    MOMENTS,
    RMS_DECAY,
    Axes,
    factored_features,
    main_columns,
    second_moments,
)

__all__ = ["fused_delta"]

Tree = Any


def fused_delta(
    th: Tree,
    p: Tensor,
    g: Tensor,
    h: dict[str, Tensor],
    axes: Axes,
    means: tuple[Tensor, Tensor],
    lr: Any,
    weight_decay: Any,
    post: Any = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Delta and new state of a tensor of at least two axes.

    Args:
        means: of the squared gradient, over rows and over columns.
        post: what is done to the direction before it is divided by its rms.
    """
    p, g = (x.contiguous() for x in (p, g))  # loops of one kind, along memory
    new = second_moments(h, *means)
    row_factor, col_factor, row_bias, col_bias = factored_features(th, new, axes)
    moments = compiled(_moments)(g, *(h[name] for name in MOMENTS))
    seen = (p, g, *moments, row_factor, col_factor)
    scale = [_inverse_rms(s, p, axes) for s in compiled(_feature_squares)(axes.matrix, *seen)]
    layers = (main_columns(th), th["w1"].mT, th["b1"], th["w2"].select(1, 0), th["b2"].select(0, 0))
    step = compiled(_direction)(layers, scale, row_bias, col_bias, *seen)
    if post is not None:
        step = post(step)
    size = _inverse_rms(compiled(_square_sum)(step, axes.matrix), p, axes)
    if isinstance(lr, Tensor) or isinstance(weight_decay, Tensor):
        delta = compiled(_delta)(step, size, p, lr, weight_decay)
    else:  # as tensors: other numbers need no other kernel
        numbers = (size.new_tensor(x) for x in (lr, weight_decay))
        delta = compiled(_delta)(step, size, p, *numbers)
    return delta, {**new, **dict(zip(MOMENTS, moments, strict=True))}


def _inverse_rms(squares: Tensor, p: Tensor, axes: Axes) -> Tensor:
    return torch.rsqrt(squares / math.prod(p.shape[i] for i in axes.matrix) + 1e-9)


# -- passes ------------------------------------------------------------------------------------


def _clamped(g: Tensor) -> Tensor:
    return torch.clamp(g, -1000.0, 1000.0)


def _moments(g: Tensor, *old: Tensor) -> list[Tensor]:
    g = _clamped(g)
    momenta = [ema(m, g, decay) for m, decay in zip(old[:3], DECAYS, strict=True)]
    return [*momenta, ema(old[3], g * g, RMS_DECAY)]


def _features(
    p: Tensor, g: Tensor, m0: Tensor, m1: Tensor, m2: Tensor, rms: Tensor, row: Tensor, col: Tensor
) -> list[Tensor]:
    """The 18 features in the order of `main_columns`."""
    g, m = _clamped(g), (m0, m1, m2)
    root = torch.rsqrt(rms + 1e-8)
    factor = [row[i] * col[i] for i in range(3)]
    own = [g, torch.clamp(g, -0.1, 0.1), p, *m, rms, *(x * root for x in m), root]
    by_factor = [*(f * g for f in factor), g * root]
    return [*own, *by_factor, *(x * f for x, f in zip(m, factor, strict=True))]


def _feature_squares(matrix: tuple[int, ...], *seen: Tensor) -> list[Tensor]:
    return sums_of_squares(_features(*seen), matrix)


def _direction(
    layers: tuple[Tensor, ...],
    scale: list[Tensor],
    row_bias: Tensor,
    col_bias: Tensor,
    *seen: Tensor,
) -> Tensor:
    w0, w1, b1, w2, b2 = layers
    rows = [x * s for x, s in zip(_features(*seen), scale, strict=True)]
    x = layer(rows, w0, [row_bias[j] + col_bias[j] for j in range(8)])
    x = layer([torch.relu(u) for u in x], w1, list(b1.unbind(0)))
    return layer([torch.relu(u) for u in x], w2.unsqueeze(0), [b2])[0]


def _square_sum(step: Tensor, matrix: tuple[int, ...]) -> Tensor:
    return sums_of_squares([step], matrix)[0]


def _delta(step: Tensor, size: Tensor, p: Tensor, lr: Any, weight_decay: Any) -> Tensor:
    return -lr * (step * size + weight_decay * p)
