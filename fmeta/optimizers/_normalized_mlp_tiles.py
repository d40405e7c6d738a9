"""`normalized_mlp` tile by tile: no feature is laid out for a whole tensor.

The formulas are those of `fmeta.optimizers._normalized_mlp_net`, in memory that is used again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta.optimizers._layout import small_matrices_first
from fmeta.optimizers._normalized_mlp_net import (
    DECAYS,
    MOMENTS,
    RMS_DECAY,
    Sides,
    axes_in,
    axes_of,
    clamped,
    layers_of,
    main_columns,
    normalized_delta,
    of_sides,
    side_columns,
    unfactored,
)
from fmeta.optimizers._tiles import Cuts, Scratch

__all__ = ["Net", "tiled"]

Tree = Any

_FEATURES, _UNITS = 18, 8
# Each matrix of at least so many coordinates gets a product of its own, with the features' scales
# folded into the weights.
_LARGE = 2**11
_WEIGHTS = tuple(1 - d for d in (*DECAYS, RMS_DECAY))


class Net:
    """What the weights mean, the same for all tensors of a step.

    Attributes:
        columns: the first layer of the features that differ from coordinate to coordinate,
            ``(8, 18)``.
        sides: of `of_sides`.
        layers: those after the first.
        weights: ``1 - decay`` of the factored second moments, ``(3,)``.
        scratch: memory for tiles.
    """

    def __init__(self, th: Tree) -> None:
        self.columns, self.layers = main_columns(th), layers_of(th)
        self.sides = side_columns(th), th["b0"]
        self.weights = th["w0"].new_tensor(_WEIGHTS[: len(DECAYS)])
        self.scratch = Scratch()


def tiled(
    net: Net,
    p: Tensor,
    g: Tensor,
    h: dict[str, Tensor],
    batch: int,
    lr: Any,
    weight_decay: Any,
    post: Callable[[Tensor], Tensor] | None,
    size: int,
    own: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Delta and new state of a tensor of at least two axes; only without derivatives.

    Args:
        batch: leading axes of ``p`` that are those of a stack.
        post: what is done to the direction before it is normalised.
        size: coordinates a tile.
        own: whether the state's memory may be used for the new one.
    """
    work = _Work(net, p, g, h, batch, size, own)
    sides, new = work.second_moments(own)
    if post is not None:
        step = post(work.run(sides, None))
        return normalized_delta(step, p, lr, weight_decay, axes_of(tuple(p.shape), batch)), new
    each = isinstance(lr, Tensor) and lr.ndim > 0
    delta, rate = work.run(sides, 1.0 if each else -lr), -lr * weight_decay
    if each:
        delta.mul_(-lr)
    if isinstance(rate, Tensor):
        delta.addcmul_(rate, p)
    elif rate:
        delta.add_(p, alpha=rate)
    return delta, new


class _Work:
    """One tensor, or stack, in tiles.

    Small matrices are worked on with their axes first, so that loops are long; a tile then holds
    whole ones, ``(matrix, matrices)``, otherwise ``(matrices, matrix)``. A matrix that is cut is
    passed over twice: for the features' sums of squares, then the features once more and the
    network.
    """

    def __init__(
        self, net: Net, p: Tensor, g: Tensor, h: dict[str, Tensor], batch: int, size: int, own: bool
    ) -> None:
        self.net, self.hidden = net, h
        self.layout = layout = small_matrices_first(tuple(p.shape), batch)
        self.outer = axes_of(tuple(p.shape), batch)
        self.axes = axes_in(layout, self.outer)
        assert self.outer.factored is not None
        assert self.axes.factored is not None
        self.lacking = self.outer.factored[::-1]  # the axis that rows lack, and columns
        self.lacking_inside = self.axes.factored[::-1]
        self.delta = torch.empty_like(p)
        self.new = {}
        for name in MOMENTS:
            x = h[name]
            if not own or not (layout is None or layout.fits(x)):
                x = torch.empty_like(x) if layout is None else layout.empty(x)
            self.new[name] = x
        self.p = self._inside(p)
        self.cuts = cuts = Cuts(self.p.shape, size, whole=0 if layout is None else 2)
        self.params, self.grads, self.deltas, *moments = (
            cuts.of(self._inside(x))
            for x in (p, g, self.delta, *(h[k] for k in MOMENTS), *self.new.values())
        )
        self.old, self.moments = moments[:4], moments[4:]
        self.count = math.prod(self.p.shape[i] for i in self.axes.matrix)

    def _inside(self, x: Tensor, before: int = 0) -> Tensor:
        return x if self.layout is None else self.layout.into(x, before)

    def _outside(self, x: Tensor, before: int = 0) -> Tensor:
        return x if self.layout is None else self.layout.back(x, before)

    # -- means over rows and columns -----------------------------------------------------------

    def second_moments(self, own: bool) -> tuple[Sides, dict[str, Tensor]]:
        """What is known of rows and columns, and the whole new state."""
        means, found, inside = self._squared_means(), dict(self.new), []
        olds = unfactored(self.hidden, self.lacking)
        weight = self.net.weights.reshape(-1, *(1,) * self.p.ndim)
        for name, axis, old, mean in zip(("row", "col"), self.lacking, olds, means, strict=True):
            old = self._inside(old, 1)
            new = torch.lerp(old, mean.add_(1e-30), weight, out=old if own else None)
            inside.append(new)
            x = self._outside(new, 1).squeeze(axis + 1).movedim(0, -1)
            found[name] = self.hidden[name] if own else x
        row, col = inside
        return of_sides(*self.net.sides, row, col, self.axes), found

    def _squared_means(self) -> list[Tensor]:
        """Of the clamped gradient, over d0 and over d1."""
        lacking, shape = self.lacking_inside, self.p.shape
        if len(self.cuts.shapes) == 1:  # the features will find what is computed here
            x = self._memory(0)
            square = torch.square(clamped(self.grads[0], x[0]), out=x[1])
            return [square.mean(axis, keepdim=True) for axis in lacking]
        sums = [
            self.p.new_zeros([1 if i == axis else n for i, n in enumerate(shape)])
            for axis in lacking
        ]
        parts = [self.cuts.of(x) for x in sums]
        for i, grad in enumerate(self.grads):
            square = clamped(grad, self._memory(i)[0]).square_()
            for part, axis in zip(parts, lacking, strict=True):
                part[i].add_(square.sum(axis, keepdim=True))
        return [x.div_(shape[axis]) for x, axis in zip(sums, lacking, strict=True)]

    # -- the network ---------------------------------------------------------------------------

    def run(self, sides: Sides, factor: Any) -> Tensor:
        """``factor d / rms(d)``, in the given order of axes; where factor is None, d."""
        self.factors = [self.cuts.of(x, 1) for x in (sides.row_factor, sides.col_factor)]
        biases = [self.cuts.of(x, 1) for x in (sides.row_bias, sides.col_bias)]
        w1, b1, w2, b2 = self.net.layers
        is_cut = any(axis in self.axes.matrix for axis, *_ in self.cuts.axes)
        scales = self._scales_of_cut() if is_cut else None
        totals = [] if factor is None or not is_cut else self._zeros(1)
        for i, shape in enumerate(self.cuts.shapes):
            n = math.prod(shape)
            x = self._fill(i, again=is_cut)
            scale = scales[i] if scales else self._scale(self._squares(x))
            first = self._layer(i)[:_UNITS]
            torch.add(*(bias[i] for bias in biases), out=first.view(_UNITS, *shape))
            self._first_layer(x, scale, first)
            # The features' memory is free now.
            second = torch.addmm(b1, w1, first.relu_(), out=x.view(_FEATURES, n)[:_UNITS])
            out = torch.mv(second.relu_().mT, w2, out=first[0]).add_(b2).view(1, *shape)
            if factor is not None:
                squares = self._squares(out)
                if is_cut:
                    totals[1][i].add_(squares.view(totals[1][i].shape))
                else:
                    self._grouped(out).mul_(self._scale(squares).mul_(factor))
            self.deltas[i].copy_(out[0])
        if totals:
            self.delta.mul_(self._scale(totals[0][0]).mul_(factor))
        return self.delta

    def _scales_of_cut(self) -> list[Tensor]:
        sums, parts = self._zeros(_FEATURES)
        for i, part in enumerate(parts):
            part.add_(self._squares(self._fill(i, again=False)).view(part.shape))
        return self.cuts.of(self._scale(sums), 1)

    def _zeros(self, rows: int) -> tuple[Tensor, list[Tensor]]:
        """A number for each matrix, and its tiles."""
        shape = [1 if i in self.axes.matrix else n for i, n in enumerate(self.p.shape)]
        x = self.p.new_zeros(rows, *shape)
        return x, self.cuts.of(x, 1)

    def _fill(self, i: int, again: bool) -> Tensor:
        """The features of tile i; where not ``again``, its moments are brought up first."""
        x = self._memory(i)
        g, clipped, m, rms, m_root, root = x[0], x[1], x[3:6], x[6], x[7:10], x[10]
        g_factor, g_root, m_factor = x[11:14], x[14], x[15:]
        if len(self.cuts.shapes) > 1:
            clamped(self.grads[i], g)
            if not again:
                torch.square(g, out=clipped)
        moments = [tiles[i] for tiles in self.moments]
        if not again:
            values = (g, g, g, clipped)
            for old, value, weight, new in zip(self.old, values, _WEIGHTS, moments, strict=True):
                torch.lerp(old[i], value, weight, out=new)
        torch.stack([self.params[i], *moments], out=x[2:7])
        torch.clamp(g, -0.1, 0.1, out=clipped)
        torch.rsqrt(torch.add(rms, 1e-8, out=root), out=root)
        torch.mul(m, root, out=m_root)
        torch.mul(g, root, out=g_root)
        torch.mul(self.factors[0][i], self.factors[1][i], out=m_factor)
        torch.mul(m_factor, g, out=g_factor)
        m_factor.mul_(m)
        return x

    def _first_layer(self, x: Tensor, scale: Tensor, out: Tensor) -> None:
        """Adds the product of the features, each times its scale, to ``out``, ``(8, n)``."""
        w, number = self.net.columns, scale.numel() // _FEATURES
        if number == 1:
            out.addmm_(w * scale.view(1, -1), x.view(_FEATURES, -1))
        elif self.layout is None and self.count >= _LARGE:
            each = w * scale.view(_FEATURES, number).mT.unsqueeze(1)
            y = out.view(_UNITS, number, -1).transpose(0, 1)
            y.baddbmm_(each, self._grouped(x).transpose(0, 1))
        else:
            self._grouped(x).mul_(scale)
            out.addmm_(w, x.view(_FEATURES, -1))

    # -- tiles ---------------------------------------------------------------------------------

    def _memory(self, i: int) -> Tensor:
        return self.net.scratch("features", self.p, (_FEATURES, *self.cuts.shapes[i]))

    def _layer(self, i: int) -> Tensor:
        return self.net.scratch("layer", self.p, (_UNITS + 1, math.prod(self.cuts.shapes[i])))

    def _grouped(self, x: Tensor) -> Tensor:
        """``(rows, matrix, matrices)`` or ``(rows, matrices, matrix)``."""
        if self.layout is not None:
            return x.view(x.shape[0], self.count, -1)
        return x.view(x.shape[0], -1, math.prod(x.shape[-2:]))

    def _squares(self, x: Tensor) -> Tensor:
        """Sums of squares over each matrix; of shapes to go with `_grouped`."""
        y = self._grouped(x)
        if self.layout is None:
            return torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_()
        if len(y) == 1:
            return y.square().sum(1, keepdim=True)
        # A norm over outer axes is slow; the squares of half the features at a time fit into the
        # memory of a layer.
        sums, half = y.new_empty(len(y), 1, y.shape[-1]), len(y) // 2
        memory = self.net.scratch("layer", y, (half, *y.shape[1:]))
        for rows, out in zip(y.split(half), sums.split(half), strict=True):
            torch.sum(torch.square(rows, out=memory), 1, keepdim=True, out=out)
        return sums

    def _scale(self, squares: Tensor) -> Tensor:
        return squares.div_(self.count).add_(1e-9).rsqrt_()
