"""`adafactor_mlp` compiled: a few loops over a tensor, without temporaries.

The loops are in `fmeta.optimizers._adafactor_mlp_loops`. Several tensors of one shape go together,
in the order of axes of `Form`; their state lies in memory in that order and is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._adafactor_mlp_loops import Sizes, features, loops_of
from fmeta.optimizers._adafactor_mlp_net import Net, planes
from fmeta.optimizers._coordinate_net import time_bias
from fmeta.optimizers._features import factored_axes
from fmeta.optimizers._forms import Part, taken
from fmeta.optimizers._fused import FUSED_NUMEL, recorded

__all__ = ["MOST_UNITS", "features", "form_of", "fused", "is_fused"]

# Larger networks are too long written out unit by unit: in a step that is compiled as a whole, with
# one for each tensor, layers of more units; in the loops here, networks of more weights (two layers
# of 32 units take a fifth longer than by tiles, and ten minutes to compile).
MOST_UNITS = 8
_MOST_WEIGHTS = 640
# Loops over fewer coordinates than this would hardly use a vector of numbers.
_SHORT = 8
# What is left over of shorter loops than this, by vectors of so many, would take most of the time.
_LONG, _LANES = 48, 16


class Form(NamedTuple):
    """How a tensor of at least two axes is seen, or a stack of them: as ``(B, o, k, i)``.

    The axes o and i are the two largest, along which second moments are factored; k is all others.

    Attributes:
        plane: of what has the leaf's shape.
        first: of factored second moments that lack i, ``(B, decays, o, k)``.
        second: of those that lack o, ``(B, decays, k, i)``.
        rows_first: whether ``first`` are the rows, which lack the largest axis.
    """

    plane: Part
    first: Part
    second: Part
    rows_first: bool

    def parts(self, names: list[str]) -> dict[str, Part]:
        """Of the entries of the state, those with the leaf's shape first."""
        sides = ("row", "col") if self.rows_first else ("col", "row")
        factored = zip(sides, (self.first, self.second), strict=True)
        return {**{name: self.plane for name in names}, **dict(factored)}


def form_of(shape: tuple[int, ...], batch: int, decays: int) -> Form:
    """The form for a leaf of at least two axes, or a stack of them along ``batch`` leading axes."""
    d1, d0 = (axis + batch for axis in factored_axes(shape[batch:]))
    outer, inner = sorted((d1, d0))
    if shape[inner] < _SHORT:  # loops are along it
        outer, inner = inner, outer
    lead, n = tuple(range(batch)), len(shape)
    others = tuple(axis for axis in range(batch, n) if axis not in (outer, inner))
    b, k = math.prod(shape[:batch]), math.prod(shape[axis] for axis in others)

    def side(own: tuple[int, ...], without: int) -> tuple[int, ...]:
        """The order of a side's axes; its last one is that of decays."""
        return (*lead, n - 1, *(axis - (axis > without) for axis in own))

    return Form(
        Part((*lead, outer, *others, inner), (b, shape[outer], k, shape[inner])),
        Part(side((outer, *others), inner), (b, decays, shape[outer], k)),
        Part(side((*others, inner), outer), (b, decays, k, shape[inner])),
        d0 == inner,
    )


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
    names, shape = planes(net), tuple(p.shape)
    form = form_of(shape, batch, len(net.momentum))
    state, new = taken(form.parts(names), h, own)
    units = tuple(len(w) for w in (net.columns, *(w for w, _ in net.layers[:-1])))
    fn, example = loops_of(Sizes(len(net.momentum), len(net.rms), units))
    run = recorded(fn, example, p.device, p.dtype, by_cpp=True)
    bias = time_bias(net.time, h["count"], p, batch)
    bias = bias.reshape(len(bias), -1).mT.contiguous()
    seen = (form.plane.into(x.detach()) for x in (p, g))
    before, after = _weights(net, form.rows_first)
    (delta,) = run(*before, bias, *after, *state, *seen)
    new = {name: new[name] for name in (*names, "row", "col")}
    return form.plane.back(delta, shape), {**new, "count": h["count"] + 1}


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
