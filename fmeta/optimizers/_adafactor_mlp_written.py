"""`adafactor_mlp` written out unit by unit, for a step that is recorded and compiled as a whole.

The formulas are those of `fmeta.optimizers._adafactor_mlp_net.steps`. There features are laid out
in memory for a matrix product; here they are numbers of a coordinate, which never leave the
registers of a compiled loop.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fmeta._trace import for_compiler
from fmeta.optimizers._adafactor_mlp_fused import MOST_UNITS, features
from fmeta.optimizers._adafactor_mlp_net import Net, axes_of, of_sides, planes, second_moments
from fmeta.optimizers._coordinate_net import EPS, time_bias
from fmeta.optimizers._fused import layer
from fmeta.optimizers._written_order import (
    WRITTEN_NUMEL,
    order_of,
    stored,
    sum_of_rows,
    zeros_of,
)

__all__ = ["is_written_out", "written_out"]


def is_written_out(net: Net, p: Tensor, batch: int) -> bool:
    """Whether this is the form for a tensor."""
    if not for_compiler() or batch or p.ndim < 2 or p.numel() < WRITTEN_NUMEL:
        return False
    return max(len(net.columns), *(len(w) for w, _ in net.layers)) <= MOST_UNITS


def written_out(
    net: Net, p: Tensor, g: Tensor, h: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-step_mult d exp(exp_mult e)`` and the new state, of a tensor of at least two axes."""
    order = order_of(tuple(p.shape))
    delta, new = _in_order(net, order.into(p), order.into(g), order.state_into(h))
    return order.leaf.back(delta), order.state_back(new)


def _in_order(
    net: Net, p: Tensor, g: Tensor, h: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    axes, square, new = axes_of(p, 0), g * g, {}
    assert axes is not None
    second = second_moments(net, h, {"row": square.mean(axes[1]), "col": square.mean(axes[0])})
    sides = of_sides(net, second, axes, 0)
    of_row, of_col = stored(sides.row_factor), stored(sides.col_factor)
    zero = zeros_of(of_row.select(0, 0), of_col.select(0, 0))
    for name, weight in zip(planes(net), (*net.momentum, *net.rms), strict=True):
        new[name] = torch.lerp(h[name], square if name.startswith("rms") else g, weight)
    moments, momenta = [new[name] for name in planes(net)], len(net.momentum)
    rows = features(moments, momenta, of_row.unbind(0), of_col.unbind(0), p, g)
    squares = torch.stack([sum_of_rows((x + zero).square()) for x in rows])
    columns = net.columns * torch.rsqrt(squares / p.numel() + EPS)
    bias = (sides.row_bias + time_bias(net.time, h["count"], p, 0)).unbind(0)
    x = [a + b for a, b in zip(bias, sides.col_bias.unbind(0), strict=True)]
    x = layer(rows, columns, x)
    for w, b in net.layers:
        x = layer([torch.relu(u) for u in x], w, [y + zero for y in b.squeeze(1).unbind(0)])
    direction, magnitude = x
    return direction * torch.exp(magnitude), {**new, **second, "count": h["count"] + 1}
