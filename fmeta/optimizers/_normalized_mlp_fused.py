"""`normalized_mlp` in compiled passes: two over a tensor, each one loop without temporaries.

What the passes compute is what `fmeta.optimizers._normalized_mlp_net` computes; see there for the
formulas. They are cut at the means over rows and columns and at the features' root mean squares.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta.optimizers._common import ema
from fmeta.optimizers._features import is_unobserved, sum_of_squares
from fmeta.optimizers._fused import compiled, layer, of_one_order, one_loop, sums_of_squares
from fmeta.optimizers._normalized_mlp_net import (
    DECAYS,
    MOMENTS,
    RMS_DECAY,
    Axes,
    factored_features,
    main_columns,
    second_moments,
)

__all__ = ["features", "fused_delta"]

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
    sides = of_one_order(factored_features(th, new, axes), axes.factored)
    row_factor, col_factor, row_bias, col_bias = sides
    zeros = one_loop(row_factor[0], col_factor[0])
    old = [h[name] for name in MOMENTS]
    seen = (row_factor, col_factor, zeros, p, g)
    moments, squares = compiled(_moments_and_squares)(axes.matrix, old, *seen)
    scale = [_inverse_rms(s, p, axes) for s in squares]
    layers = (main_columns(th), th["w1"].mT, th["b1"], th["w2"].select(1, 0), th["b2"].select(0, 0))
    biases = row_bias, col_bias
    step, square = compiled(_direction)(axes.matrix, layers, scale, biases, moments, *seen)
    if post is not None:
        step = post(step)
        square = sum_of_squares(step, axes.matrix)
    factor = -lr * _inverse_rms(square, p, axes)
    delta = step.mul_(factor) if is_unobserved(step, factor) else step * factor
    if isinstance(weight_decay, Tensor) or weight_decay:
        delta = delta + -lr * weight_decay * p
    return delta, {**new, **dict(zip(MOMENTS, moments, strict=True))}


def _inverse_rms(squares: Tensor, p: Tensor, axes: Axes) -> Tensor:
    count = math.prod(p.shape[i] for i in axes.matrix)
    if is_unobserved(squares):  # of many small matrices there are many
        return squares.div_(count).add_(1e-9).rsqrt_()
    return torch.rsqrt(squares / count + 1e-9)


# -- passes ------------------------------------------------------------------------------------


def _clamped(g: Tensor) -> Tensor:
    return torch.clamp(g, -1000.0, 1000.0)


def _moments_and_squares(
    matrix: tuple[int, ...],
    old: list[Tensor],
    row: Tensor,
    col: Tensor,
    zeros: tuple[Tensor, Tensor],
    p: Tensor,
    g: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """The new moments, and the sums of squares of the features."""
    g = _clamped(g) + (zeros[0] + zeros[1])
    new = [ema(m, g, decay) for m, decay in zip(old[:3], DECAYS, strict=True)]
    new.append(ema(old[3], g * g, RMS_DECAY))
    return new, sums_of_squares(_features(new, row, col, zeros, p, g), matrix)


def _features(
    moments: list[Tensor],
    row: Tensor,
    col: Tensor,
    zeros: tuple[Tensor, Tensor],
    p: Tensor,
    g: Tensor,
) -> list[Tensor]:
    zero = zeros[0] + zeros[1]
    p, *moments = (x + zero for x in (p, *moments))
    return features(moments, row, col, p, g)


def features(moments: list[Tensor], row: Tensor, col: Tensor, p: Tensor, g: Tensor) -> list[Tensor]:
    """The 18 features in the order of `main_columns`, of a clamped gradient."""
    *m, rms = moments
    root = torch.rsqrt(rms + 1e-8)
    factor = [r * c for r, c in zip(row.unbind(0), col.unbind(0), strict=True)]
    own = [g, torch.clamp(g, -0.1, 0.1), p, *m, rms]
    own += [*(x * root for x in m), root]
    by_factor = [*(f * g for f in factor), g * root]
    return [*own, *by_factor, *(x * f for x, f in zip(m, factor, strict=True))]


def _direction(
    matrix: tuple[int, ...],
    layers: tuple[Tensor, ...],
    scale: list[Tensor],
    biases: tuple[Tensor, Tensor],
    moments: list[Tensor],
    row: Tensor,
    col: Tensor,
    zeros: tuple[Tensor, Tensor],
    p: Tensor,
    g: Tensor,
) -> tuple[Tensor, Tensor]:
    """The direction, and its sum of squares."""
    w0, w1, b1, w2, b2 = layers
    seen = _features(moments, row, col, zeros, p, _clamped(g))
    rows = [x * s for x, s in zip(seen, scale, strict=True)]
    bias = [r + c for r, c in zip(*(x.unbind(0) for x in biases), strict=True)]
    x = [torch.relu(u) for u in layer(rows, w0, bias)]
    zero = zeros[0] + zeros[1]
    x = [torch.relu(u) for u in layer(x, w1, [b + zero for b in b1.unbind(0)])]
    (step,) = layer(x, w2.unsqueeze(0), [b2 + zero])
    return step, sums_of_squares([step + zero], matrix)[0]
