"""`adafactor_mlp` tile by tile: no feature is laid out for a whole tensor.

The formulas are those of `fmeta.optimizers._adafactor_mlp_net.steps`, in memory that is used again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fmeta.optimizers._adafactor_mlp_net import (
    Net,
    Sides,
    axes_of,
    layout_of,
    of_sides,
    planes,
    second_moments,
)
from fmeta.optimizers._coordinate_net import time_bias
from fmeta.optimizers._features import tiled_means
from fmeta.optimizers._layout import Layout
from fmeta.optimizers._tiled_network import Features, tiled_steps
from fmeta.optimizers._tiles import Cuts

__all__ = ["tiled"]


def tiled(
    net: Net,
    p: Tensor,
    g: Tensor,
    h: Mapping[str, Tensor],
    batch: int,
    size: int,
    own: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-step_mult d exp(exp_mult e)`` and the new state; only without derivatives.

    Args:
        size: coordinates a tile.
        own: whether the state's memory may be used for the new one.
    """

    def squared(part: Tensor, _: Tensor) -> Tensor:
        return torch.mul(part, part, out=net.scratch("features", part, part.shape))

    axes, layout = axes_of(p, batch), layout_of(tuple(p.shape), batch)
    bias = [time_bias(net.time, h["count"], p, batch)]
    if axes is None:
        cuts, columns = Cuts(p.shape, size), net.flat_columns
        second = second_moments(net, h, {"v": g * g}, own)
        of_second = [cuts.of(second["v"].movedim(-1, 0), 1)]
    else:
        row, col = tiled_means(squared, g, axes, size)
        second = second_moments(net, h, {"row": row, "col": col}, own)
        sides, columns = of_sides(net, second, axes, batch), net.columns
        if layout is not None:
            sides = Sides(*(layout.into(x, 1).contiguous() for x in sides))
            p, g = (layout.into(x).contiguous() for x in (p, g))
        cuts = Cuts(p.shape, size)
        of_second = [cuts.of(x, 1) for x in (sides.row_factor, sides.col_factor)]
        bias = [bias[0] + sides.row_bias, sides.col_bias]
    old = {name: h[name] for name in planes(net)}
    new = {name: _new(x, layout, own) for name, x in old.items()}
    weights = (*net.momentum, *net.rms)
    of_p, of_g = cuts.of(p), cuts.of(g)
    of_old, of_new = (
        [cuts.of(x if layout is None else layout.into(x)) for x in state.values()]
        for state in (old, new)
    )
    n, k, a = len(net.momentum), len(net.rms), len(net.adafactor)
    at = 2 + n + k  # features that are given: g, p, m, v

    def fill(i: int, x: Tensor, again: bool) -> None:
        grad, values = of_g[i], [plane[i] for plane in of_new]
        if not again:
            square = torch.mul(grad, grad, out=x[0])
            for j, (before, weight) in enumerate(zip(of_old, weights, strict=True)):
                torch.lerp(before[i], grad if j < n else square, weight, out=values[j])
        torch.stack([grad, of_p[i], *values], out=x[:at])
        m, m_root, root = x[2 : 2 + n], x[at : at + n], x[at + n : at + n + k]
        torch.rsqrt(torch.add(x[2 + n : at], 1e-6, out=root), out=root)
        torch.mul(m, root, out=m_root)
        by_g, by_m, *rest = x[at + n + k :].split(a)
        if axes is not None:
            factor = torch.mul(of_second[0][i], of_second[1][i], out=by_m)
            torch.mul(factor, x[0], out=by_g)
            by_m.mul_(m)
            return
        w, w_root = rest[0].copy_(of_second[0][i]), rest[1]
        torch.rsqrt(torch.add(w, 1e-9, out=by_g).clamp_(min=1e-9), out=by_g).mul_(x[0])
        torch.rsqrt(torch.add(w, 1e-6, out=by_m), out=by_m).mul_(m)
        torch.rsqrt(torch.add(w, 1e-8, out=w_root), out=w_root)

    features = Features(columns.shape[1], fill, bias)
    delta = tiled_steps(features, cuts, columns, net.layers, p, batch, net.scratch)
    delta = delta if layout is None else layout.back(delta)
    return delta, {**new, **second, "count": h["count"] + 1}


def _new(old: Tensor, layout: Layout | None, own: bool) -> Tensor:
    """Memory for what replaces ``old``."""
    if own and (layout is None or layout.fits(old)):
        return old
    return torch.empty_like(old) if layout is None else layout.empty(old)
