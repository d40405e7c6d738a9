"""The network of `velo` that sees coordinates, and the steps it makes.

The formulas are written once, for a stack of leaves (one leaf is a stack of one): `steps` runs them
on whole tensors, `tiled_steps` tile by tile in memory that is used again, where no derivative is
recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fmeta.optimizers._features import Tile, split, stacked_ema, sum_of_squares, tiled_means
from fmeta.optimizers._velo_features import (
    EPS,
    MOMENTS,
    Decays,
    Net,
    Slots,
    clamped,
    columns_of,
    factored,
    factored_axes,
    features_of,
    moments,
    second_moments,
)

__all__ = ["TILE", "steps", "tiled_steps"]

# Coordinates a tile, where no derivative is recorded: the features of a tile stay in cache.
TILE = 2**16


def steps(
    net: Net, p: Tensor, g: Tensor, h: Mapping[str, Tensor], decays: Decays, exp_mult: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """``direction * exp(exp_mult * magnitude)`` of a stack of leaves, and the new state.

    Args:
        net: a network for each of the B leaves.
        p, g: ``(B, *leaf)``.
        h: the state, with the leading axis too.

    Returns:
        ``((B, *leaf), state)``.
    """
    g = clamped(g)
    square = g * g
    new = moments(g, square, h, decays)
    axes, small = _axes(p), None
    if axes is None:
        new["v"] = stacked_ema(h["v"], square + 1e-30, decays.adafactor)
    else:
        new |= second_moments(h, square.mean(axes[1]), square.mean(axes[0]), decays)
        small = factored(net, new, axes)
    n = p.shape[1:].numel()
    x = features_of(p, g, new, small).reshape(-1, p.shape[0], n).transpose(0, 1)
    scale = torch.rsqrt(sum_of_squares(x, (2,)) / n + EPS)
    bias = net.biases[0].unsqueeze(2)
    if small is not None:
        bias = (small.row_bias + small.col_bias).expand(-1, *p.shape)
        bias = bias.reshape(-1, p.shape[0], n).transpose(0, 1)
    x = (columns_of(net, p) * scale.mT) @ x + bias
    for w, b in zip(net.weights[1:], net.biases[1:], strict=True):
        x = w.mT @ torch.relu(x) + b.unsqueeze(2)
    direction, magnitude = x.narrow(1, 0, 2).unbind(1)
    return (direction * torch.exp(exp_mult * magnitude)).reshape(p.shape), new


def tiled_steps(
    net: Net,
    p: Tensor,
    g: Tensor,
    h: Mapping[str, Tensor],
    decays: Decays,
    exp_mult: float,
    size: int,
    own: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, tile by tile in memory that is used again and again; only without derivatives.

    Two passes: the features' sums of squares, then the features once more and the network. To
    store the features in between would cost more than to make them of six tensors again; those of
    a single tile are still there.

    Args:
        own: whether the memory of ``h`` may hold the new state.
    """
    new = {name: h[name] if own else torch.empty_like(p) for name in MOMENTS}
    axes, small = _axes(p), None
    if axes is None:
        new["v"] = stacked_ema(h["v"], clamped(g).square_().add_(1e-30), decays.adafactor)
    else:
        new |= second_moments(h, *_squared_means(g, axes, size), decays)
        small = factored(net, new, axes)
    tiles = list(split(p.shape, size, alone=p.numel() + 1))
    columns = columns_of(net, p)
    memory = _Memory(p, columns.shape[2], net, max(math.prod(tile.shape) for tile in tiles))

    def features(tile: Tile, x: Slots, values: Mapping[str, Tensor]) -> Tensor:
        of = None if small is None else small.of(tile)
        made = features_of(tile.of(p), x.g, values, of, x)
        return made.view(made.shape[0], tile.shape[0], -1).transpose(0, 1)

    squares = p.new_zeros(p.shape[0], columns.shape[2], 1)
    for tile in tiles:
        x = memory.features(tile.shape)
        part = clamped(tile.of(g), out=x.g)
        square = torch.mul(part, part, out=x.clipped)
        old = {name: tile.of(h[name]) for name in MOMENTS}
        values = {name: tile.of(y) for name, y in new.items() if small is None or name in MOMENTS}
        moments(part, square, old, decays, values)
        made = features(tile, x, values)
        squares[tile.slices[0]] += sum_of_squares(made, (2,), fused=True)

    columns = columns * torch.rsqrt(squares / p.shape[1:].numel() + EPS).mT
    layers = _folded(net, exp_mult)
    step = torch.empty_like(p)
    for tile in tiles:
        x, buffers, leaves = memory.features(tile.shape), memory.layers(tile), tile.slices[0]
        if len(tiles) > 1:
            clamped(tile.of(g), out=x.g)
            kept = {name: y for name, y in new.items() if small is None or name in MOMENTS}
            made = features(tile, x, {name: tile.of(y) for name, y in kept.items()})
        bias = net.biases[0][leaves].unsqueeze(2)
        if small is not None:
            of, bias = small.of(tile), buffers[0]
            parts = (y.transpose(0, 1) for y in (of.row_bias, of.col_bias))
            torch.add(*parts, out=bias.view(tile.shape[0], -1, *tile.shape[1:]))
        y = torch.baddbmm(bias, columns[leaves], made, out=buffers[0])
        for (w, b), out in zip(layers, buffers[1:], strict=True):
            y = torch.baddbmm(b[leaves], w[leaves], y.relu_(), out=out)
        direction, magnitude = (z.view(tile.shape) for z in y.unbind(1))
        torch.mul(direction, magnitude.exp_(), out=tile.of(step))
    return step, new


def _axes(p: Tensor) -> tuple[int, int] | None:
    """The factored axes of a stack of leaves, or None for vectors and scalars."""
    if p.ndim < 3:
        return None
    d1, d0 = factored_axes(p.shape[1:])
    return d1 + 1, d0 + 1


def _squared_means(g: Tensor, axes: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Means of the clamped gradient's square over d0 and over d1, in little memory."""

    def square(part: Tensor, out: Tensor) -> Tensor:
        return clamped(part, out).square_()

    if g.shape[0] > 1:
        return tiled_means(square, g, axes, size)
    row, col = tiled_means(square, g.squeeze(0), (axes[0] - 1, axes[1] - 1), size)
    return row.unsqueeze(0), col.unsqueeze(0)


def _folded(net: Net, exp_mult: float) -> list[tuple[Tensor, Tensor]]:
    """The layers after the first, ``(B, out, in)``, the last with two outputs, one scaled."""
    layers = zip(net.weights[1:], net.biases[1:], strict=True)
    found = [(w.mT, b.unsqueeze(2)) for w, b in layers]
    w, b = (x.narrow(1, 0, 2) for x in found[-1])
    factor = w.new_tensor([[1.0], [exp_mult]])
    return [*found[:-1], (w * factor, b * factor)]


class _Memory:
    """Memory for one tile, used for all of them; the views of a shape are made once."""

    def __init__(self, like: Tensor, rows: int, net: Net, size: int) -> None:
        self.rows = rows
        self.units = [*(w.shape[2] for w in net.weights[:-1]), 2]
        self.flat_features = like.new_empty(rows * size)
        self.flat_layers = [like.new_empty(units * size) for units in self.units]
        self.by_shape: dict[tuple[int, ...], Slots] = {}

    def features(self, shape: tuple[int, ...]) -> Slots:
        if shape not in self.by_shape:
            flat = self.flat_features[: self.rows * math.prod(shape)]
            self.by_shape[shape] = Slots.of(flat.view(self.rows, *shape))
        return self.by_shape[shape]

    def layers(self, tile: Tile) -> list[Tensor]:
        """``(leaves, units, n)`` of each layer."""
        count, n = tile.shape[0], math.prod(tile.shape[1:])
        pairs = zip(self.flat_layers, self.units, strict=True)
        return [flat[: count * units * n].view(count, units, n) for flat, units in pairs]
