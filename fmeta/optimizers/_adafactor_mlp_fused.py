"""`adafactor_mlp` compiled: a few loops over a tensor, without temporaries.

The loops are in `fmeta.optimizers._adafactor_mlp_loops`. Several tensors of one shape go together,
in the order of axes of `Form`; their state lies in memory in that order and is changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fmeta.optimizers._adafactor_mlp_loops import Sizes, features, loops_of
from fmeta.optimizers._adafactor_mlp_net import Net, planes
from fmeta.optimizers._coordinate_net import time_bias
from fmeta.optimizers._forms import form_of, taken
from fmeta.optimizers._fused import FUSED_NUMEL, recorded

__all__ = ["MOST_UNITS", "features", "fused", "is_fused"]

# Larger networks are too long written out unit by unit: in a step that is compiled as a whole, with
# one for each tensor, layers of more units; in the loops here, networks of more weights (two layers
# of 32 units take a fifth longer than by tiles, and ten minutes to compile).
MOST_UNITS = 8
_MOST_WEIGHTS = 640
# What is left over of shorter loops than this, by vectors of so many, would take most of the time.
_LONG, _LANES = 48, 16


def is_fused(net: Net, p: Tensor, batch: int) -> bool:
    """Whether tensors are large enough for the compiled loops, and the network small enough."""
    if p.ndim - batch < 2 or p.numel() <= FUSED_NUMEL or p.is_meta:
        return False
    inner = form_of(tuple(p.shape), batch, len(net.momentum)).plane.sizes[-1]
    if inner < _LONG and inner % _LANES:
        return False
    return sum(w.numel() for w in (net.columns, *(w for w, _ in net.layers))) <= _MOST_WEIGHTS


def fused(
    net: Net, p: Tensor, g: Tensor, h: Mapping[str, Tensor], batch: int, own: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-step_mult d exp(exp_mult e)`` and the new state, of tensors of at least two axes.

    Only without derivatives.

    Args:
        batch: leading axes of ``p`` that are those of a stack.
        own: whether the state's memory may be used for the new one.
    """
    names = planes(net)
    form = form_of(tuple(p.shape), batch, len(net.momentum))
    state, new = taken(form.parts(names), h, p, own)
    units = tuple(len(w) for w in (net.columns, *(w for w, _ in net.layers[:-1])))
    fn, example = loops_of(Sizes(len(net.momentum), len(net.rms), units))
    run = recorded(fn, example, p.device, p.dtype, by_cpp=True)
    bias = time_bias(net.time, h["count"], p, batch)
    bias = bias.reshape(len(bias), -1).mT.contiguous()
    seen = (form.plane.into(x.detach()) for x in (p, g))
    before, after = _weights(net, form.rows_first)
    (delta,) = run(*before, bias, *after, *state, *seen)
    new = {name: new[name] for name in (*names, "row", "col")}
    return form.plane.back(delta), {**new, "count": h["count"] + 1}


def _weights(net: Net, rows_first: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weights as the loops take them, before and after the bias; made once a step."""
    if rows_first not in net.memo:
        row, col = net.sides
        sides = torch.stack([row, col] if rows_first else [col, row])
        is_row = torch.tensor([rows_first, not rows_first], device=row.device)
        rates = torch.stack([*net.momentum, *net.rms])
        first = [rates, net.adafactor, net.columns.contiguous(), sides, is_row]
        layers = [y for w, b in net.layers for y in (w.contiguous(), b.flatten())]
        net.memo[rows_first] = [*first, *layers]
    made = net.memo[rows_first]
    return made[:5], made[5:]
