"""`normalized_mlp` written out unit by unit, for a step that is recorded and compiled as a whole.

The formulas are those of `fmeta.optimizers._normalized_mlp_net.direction`. There features are laid
out in memory for a matrix product; here they are numbers of a coordinate, which never leave the
registers of a compiled loop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta._trace import for_compiler
from fmeta.optimizers import _normalized_mlp_net as net
from fmeta.optimizers._common import ema
from fmeta.optimizers._fused import layer
from fmeta.optimizers._normalized_mlp_loops import features
from fmeta.optimizers._written_order import (
    WRITTEN_NUMEL,
    order_of,
    stored,
    sum_of_rows,
    zeros_of,
)

__all__ = ["is_written_out", "written_out"]

Tree = Any


def is_written_out(p: Tensor, batch: int) -> bool:
    """Whether this is the form for a tensor: for one matrix, or the kernels of a convolution."""
    return for_compiler() and not batch and p.ndim >= 2 and p.numel() >= WRITTEN_NUMEL


def written_out(
    th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], axes: net.Axes
) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's direction for a tensor of at least two axes, and the new state."""
    order = order_of(tuple(p.shape))
    axes = net.axes_in(order.leaf, axes)
    step, new = _in_order(th, order.into(p), order.into(g), order.state_into(h), axes)
    return order.leaf.back(step), order.state_back(new)


def _in_order(
    th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], axes: net.Axes
) -> tuple[Tensor, dict[str, Tensor]]:
    assert axes.factored is not None
    d1, d0 = axes.factored
    g = net.clamped(g)
    square = g * g
    new = net._moments(g, square, h)
    new |= {"row": _second(h["row"], square.mean(d0)), "col": _second(h["col"], square.mean(d1))}
    sides = net.factored_features(th, new, axes)
    of_row, of_col = (stored(x).unbind(0) for x in (sides.row_factor, sides.col_factor))
    zero = zeros_of(of_row[0], of_col[0])
    rows = features([new[name] for name in net.MOMENTS], of_row, of_col, p, g)
    w, size = net.main_columns(th), math.prod(p.shape[i] for i in axes.matrix)
    if len(axes.matrix) == p.ndim:  # one matrix: one scale for each feature
        squares = torch.stack([sum_of_rows((x + zero).square()) for x in rows])
        w = w * torch.rsqrt(squares / size + 1e-9)
    else:
        squares = torch.stack([(x + zero).square().sum(axes.matrix, keepdim=True) for x in rows])
        scale = stored(torch.rsqrt(squares / size + 1e-9))
        rows = [x * y for x, y in zip(rows, scale.unbind(0), strict=True)]
    bias = zip(sides.row_bias.unbind(0), sides.col_bias.unbind(0), strict=True)
    w1, b1, w2, b2 = net.layers_of(th)
    x = [torch.relu(u) for u in layer(rows, w, [row + col for row, col in bias])]
    x = [torch.relu(u) for u in layer(x, w1, [b + zero for b in b1.squeeze(1).unbind(0)])]
    return layer(x, w2.unsqueeze(0), [b2 + zero])[0], new


def _second(old: Tensor, square: Tensor) -> Tensor:
    """Averages of squares with each decay, on a trailing axis that is first in memory."""
    pairs = zip(old.unbind(-1), net.DECAYS, strict=True)
    return torch.stack([ema(x, square + 1e-30, decay) for x, decay in pairs]).movedim(0, -1)
