"""The network of `fmeta.optimizers._coordinate_net` tile by tile, in memory that is used again.

Only where no derivative is recorded. A tile's features are made at once, as each operation has its
price; the network goes over them piece by piece, as all of its layers stay in a nearer cache then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._coordinate_net import EPS, Layers
from fmeta.optimizers._tiles import Cuts, Scratch

__all__ = ["Features", "tile_size", "tiled_steps"]

# Numbers of a tile, its features and a few beside them, so that they stay in the last cache of a
# CPU (measured: a quarter of it is slower by half, as each operation has its price and a leaf that
# is cut is passed over twice; twice as many by a third); elsewhere, coordinates that keep the
# device busy.
_IN_CACHE = 3 * 2**20
_BESIDE = 8
# Numbers that the layers take at a time, which stay in a nearer cache (measured: half and twice as
# many are slower by a few percent).
_NEARER = 2**18
_ELSEWHERE = 2**22


class Features(NamedTuple):
    """How the features of a tile are made, in memory that is used again.

    Attributes:
        rows: how many.
        fill: ``(i, x, again)``: fills ``x``, ``(rows, *tile)``, with the features of tile i. The
            first time, not ``again``, it also brings the moments of the tile up to date.
        bias: tensors, ``(units, *)`` to be broadcast, one or two, whose sum is the first layer's
            bias.
    """

    rows: int
    fill: Callable[[int, Tensor, bool], None]
    bias: Sequence[Tensor]


def tile_size(columns: Tensor, p: Tensor) -> int:
    """Coordinates a tile of ``p``, with the features of these columns."""
    return _IN_CACHE // (columns.shape[1] + _BESIDE) if p.device.type == "cpu" else _ELSEWHERE


def tiled_steps(
    features: Features,
    cuts: Cuts,
    columns: Tensor,
    layers: Layers,
    p: Tensor,
    batch: int,
    scratch: Scratch,
) -> Tensor:
    """`fmeta.optimizers._coordinate_net.run_layers`, tile by tile.

    A leaf that is cut is passed over twice: for the features' sums of squares, then the features
    once more and the network. To store the features in between would cost more than to make them
    again.

    Args:
        cuts: of tensors of the shape of ``p``.
        scratch: memory for features and layers.
    """
    count, rows = math.prod(p.shape[batch:]), features.rows
    delta = torch.empty_like(p)
    deltas, biases = cuts.of(delta), [cuts.of(b, 1) for b in features.bias]
    known: list[Tensor] | None = None
    if any(axis >= batch for axis, *_ in cuts.axes):
        sums = p.new_zeros(rows, *p.shape[:batch], *(1,) * (p.ndim - batch))
        for i, part in enumerate(cuts.of(sums, 1)):
            x = scratch("features", p, (rows, *cuts.shapes[i]))
            features.fill(i, x, False)
            part.add_(_squares(x, batch))
        known = cuts.of(_scale(sums, count), 1)
    network = _Network(columns, layers, scratch)
    for i, shape in enumerate(cuts.shapes):
        x = scratch("features", p, (rows, *shape))
        features.fill(i, x, known is not None)
        scale = _scale(_squares(x, batch), count) if known is None else known[i]
        network(x, scale.view(rows, -1), [parts[i] for parts in biases], deltas[i])
    return delta


class _Network:
    """The network, on one tile after another.

    Memory for two layers is used in turns: one is read while the next is written. Before their
    units is a one, by which the next layer's bias comes with its product: added, it would cost a
    pass over all units.
    """

    def __init__(self, columns: Tensor, layers: Layers, scratch: Scratch) -> None:
        self.columns, self.scratch = columns, scratch
        self.layers = [torch.cat([b, w], 1) for w, b in layers]
        self.widths = [len(columns), *(len(w) for w in self.layers[:-1])]
        self._layers_of: dict[tuple[int, ...], _Units] = {}
        self._ones = 0

    def __call__(self, x: Tensor, scale: Tensor, bias: Sequence[Tensor], out: Tensor) -> None:
        """The network on a tile.

        Args:
            x: features, ``(features, *tile)``; may be changed.
            scale: of the features, ``(features, leaves)``.
            bias: as in `Features`, of the tile.
            out: what it writes.
        """
        n, leaves = out.numel(), scale.shape[1]
        size = n
        if x.device.type == "cpu":
            size = _NEARER // (sum(self.widths) + 2)
        if leaves == 1:
            weights = [self.columns * scale.T]
        elif 2 * n > leaves * size:  # each piece is of one leaf
            weights = list((self.columns * scale.T.unsqueeze(1)).unbind(0))
        else:
            weights = [self.columns]
            x.mul_(scale.view(len(x), leaves, *(1,) * (x.ndim - 2)))
        pieces, last = Cuts(out.shape, size), self.scratch("last", x, (2, n))
        counts = [math.prod(shape) for shape in pieces.shapes]
        biases = [pieces.of(b, 1) for b in bias]
        parts = zip(x.view(len(x), n).split(counts, 1), last.split(counts, 1), strict=True)
        for i, (seen, found) in enumerate(parts):
            units = self._units(x, pieces.shapes[i])
            if len(biases) == 2:
                torch.add(biases[0][i], biases[1][i], out=units.shaped)
            else:
                units.shaped.copy_(biases[0][i])
            y = units.flat.addmm_(weights[i * len(weights) // len(counts)], seen)
            for w, inputs, outputs in units.later:
                y.relu_()
                y = torch.mm(w, inputs, out=outputs)
            y.relu_()
            torch.mm(self.layers[-1], units.inputs, out=found)
        direction, magnitude = last.view(2, *out.shape).unbind(0)
        torch.mul(direction, magnitude.exp_(), out=out)

    def _units(self, x: Tensor, shape: tuple[int, ...]) -> _Units:
        """Those of a piece of that shape."""
        n = math.prod(shape)
        if shape not in self._layers_of:
            most = 1 + max(self.widths)
            held = [self.scratch(f"layer {j}", x, (most, n)) for j in range(2)]
            seen = [held[j % 2].narrow(0, 0, 1 + width) for j, width in enumerate(self.widths)]
            first, *others = [y.narrow(0, 1, len(y) - 1) for y in seen]
            later = list(zip(self.layers[:-1], seen[:-1], others, strict=True))
            self._layers_of[shape] = _Units(
                first, first.view(-1, *shape), later, seen[-1], [y[0] for y in held]
            )
        units = self._layers_of[shape]
        if n != self._ones:
            for one in units.ones:
                one.fill_(1)
            self._ones = n
        return units


class _Units(NamedTuple):
    """Memory for the layers, as the products of a piece of a tile take it.

    Attributes:
        flat, shaped: of the first layer, ``(units, n)`` and ``(units, *piece)``.
        later: of each layer between the first and the last: its weights, what it reads and writes.
        inputs: of the last layer.
        ones: before the units.
    """

    flat: Tensor
    shaped: Tensor
    later: list[tuple[Tensor, Tensor, Tensor]]
    inputs: Tensor
    ones: list[Tensor]


def _squares(x: Tensor, batch: int) -> Tensor:
    """Sums of squares over the axes of a leaf, which stay as size 1."""
    kept = x.shape[: 1 + batch]
    norm = torch.linalg.vector_norm(x.view(*kept, -1), dim=-1)
    return norm.square_().view(*kept, *(1,) * (x.ndim - 1 - batch))


def _scale(squares: Tensor, count: int) -> Tensor:
    return torch.rsqrt(squares / count + EPS)
