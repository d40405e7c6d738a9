"""The direction of `normalized_mlp` in recomputed chunks, for updates that are differentiated.

The features are many times as large as the parameter, so they never exist for more than a chunk,
neither in the forward pass nor in the derivative: one pass over the chunks sums the squares of the
features (what they are normalised by), a second makes them again and runs the network. Each chunk
is recomputed in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._chunks import is_observed, pieces
from fmeta._remat import remat
from fmeta.optimizers import _normalized_mlp_net as net
from fmeta.optimizers._features import clamped_rsqrt, stacked_ema, sum_of_squares

__all__ = ["chunked_direction"]

Tree = Any


def chunked_direction(
    th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], axes: net.Axes, coordinates: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `fmeta.optimizers._normalized_mlp_net.direction`, in chunks of about ``coordinates``."""
    again = remat if is_observed() else lambda fn: fn
    g, new, scales, w, biases = again(_prepared(axes))(th, g, h)
    axis = max(range(p.ndim), key=lambda i: p.shape[i])
    sizes = pieces(p.shape[axis], coordinates, p.numel() // p.shape[axis])
    after = tuple(i + 1 for i in axes.matrix)
    values = {name: new[name] for name in net.MOMENTS}
    columns = _columns({"p": p, "g": g, **values}, axis, sizes)
    factor_columns = _columns(scales, axis + 1, sizes, p.shape[axis])
    bias_columns = _columns(biases, axis + 1, sizes, p.shape[axis])

    def squares(own: Tree, factors: Tree) -> Tensor:
        return sum_of_squares(_made(own, factors), after)

    sums = [again(squares)(o, f) for o, f in zip(columns, factor_columns, strict=True)]
    total = torch.stack(sums).sum(0) if axis in axes.matrix else torch.cat(sums, axis + 1)
    scale = net._scale(total, p, axes)
    scale_columns = _columns({"scale": scale}, axis + 1, sizes, p.shape[axis])

    def network(own: Tree, factors: Tree, biases: Tree, scale: Tree, w: Tensor, th: Tree) -> Tensor:
        made, shape = _made(own, factors), own["p"].shape
        w, made = net._scaled(w, made, scale["scale"])
        bias = biases["row"] if "col" not in biases else biases["row"] + biases["col"]
        bias = bias.expand(8, *shape).reshape(8, -1)
        out = net._network(net.layers_of(th), w, bias, made.reshape(made.shape[0], -1))
        return out.reshape(shape)

    rows = zip(columns, factor_columns, bias_columns, scale_columns, strict=True)
    return torch.cat([again(network)(*row, w, th) for row in rows], axis), new


def _prepared(axes: net.Axes) -> Any:
    """What the whole tensor gives: its new state and the parts that lie along rows and columns."""

    def fn(th: Tree, g: Tensor, h: dict[str, Tensor]) -> Any:
        g = net.clamped(g)
        square = g * g
        new = net._moments(g, square, h)
        if axes.factored is None:
            new["v"] = stacked_ema(h["v"], square, net.DECAYS)
            scales = {"row": clamped_rsqrt(new["v"] + 1e-9).movedim(-1, 0)}
            bias = th["b0"].reshape(8, *(1,) * g.ndim)
            return g, new, scales, th["w0"].narrow(0, 0, 15).mT, {"row": bias}
        d1, d0 = axes.factored
        new |= net.second_moments(h, square.mean(d0), square.mean(d1))
        row, col, row_bias, col_bias = net.factored_features(th, new, axes)
        scales, biases = {"row": row, "col": col}, {"row": row_bias, "col": col_bias}
        return g, new, scales, net.main_columns(th), biases

    return fn


def _made(own: Tree, factors: Tree) -> Tensor:
    return net._features(own["p"], own["g"], own, factors["row"], factors.get("col"))


def _columns(
    tensors: dict[str, Tensor], axis: int, sizes: list[int], size: int | None = None
) -> list[dict[str, Tensor]]:
    """Each chunk's part of these tensors; by one split, whose backward is one concatenation.

    Args:
        axis: that is cut.
        sizes: of the chunks.
        size: of the axis; tensors in which it is 1 belong to every chunk as they are.
    """
    cut = {
        k: x.split(sizes, axis) if size is None or x.shape[axis] == size else (x,) * len(sizes)
        for k, x in tensors.items()
    }
    return [{k: x[i] for k, x in cut.items()} for i in range(len(sizes))]
