"""`normalized_mlp` written out unit by unit, for a step that is recorded and compiled as a whole.

The formulas are those of `fmeta.optimizers._normalized_mlp_net.direction`. There features are laid
out in memory for a matrix product; here they are numbers of a coordinate, which never leave the
registers of a compiled loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._trace import for_compiler
from fmeta.optimizers import _normalized_mlp_net as net
from fmeta.optimizers._fused import layer
from fmeta.optimizers._normalized_mlp_loops import features

__all__ = ["is_written_out", "written_out"]

Tree = Any

_COORDINATES = 2**10  # smaller ones are not worth the longer compilation


def is_written_out(p: Tensor, batch: int) -> bool:
    """Whether this is the form for a tensor: for one matrix."""
    return for_compiler() and not batch and p.ndim == 2 and p.numel() >= _COORDINATES


def written_out(
    th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], axes: net.Axes
) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's direction for a matrix, and the new state."""
    assert axes.factored is not None
    d1, d0 = axes.factored
    g = net.clamped(g)
    square = g * g
    new = net._moments(g, square, h)
    new |= net.second_moments(h, square.mean(d0), square.mean(d1))
    sides = net.factored_features(th, new, axes)
    moments = [new[name] for name in net.MOMENTS]
    factors = sides.row_factor.unbind(0), sides.col_factor.unbind(0)
    rows = features(moments, *factors, p, g)
    squares = torch.stack([x.square().sum() for x in rows])
    w = net.main_columns(th) * torch.rsqrt(squares / p.numel() + 1e-9)
    bias = zip(sides.row_bias.unbind(0), sides.col_bias.unbind(0), strict=True)
    w1, b1, w2, b2 = net.layers_of(th)
    x = [torch.relu(u) for u in layer(rows, w, [row + col for row, col in bias])]
    x = [torch.relu(u) for u in layer(x, w1, list(b1.squeeze(1).unbind(0)))]
    return layer(x, w2.unsqueeze(0), [b2])[0], new
