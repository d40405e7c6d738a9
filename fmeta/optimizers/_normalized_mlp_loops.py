"""The loops of `normalized_mlp` that are compiled: over stacks of matrices, and of small kernels.

What they compute is what `fmeta.optimizers._normalized_mlp_net` computes; see there for the
formulas, and `fmeta.optimizers._forms.Form` for the shapes. There are three passes: for the means
of the squared gradient over rows and columns, for the features' root mean squares, for moments and
direction; and the division of the direction by its own root mean square. Matrices go through all of
them in one call. The kernels of a convolution are independent of each other once rows and columns
are known, so they go in two: the first for rows and columns, the second for a part of the kernels
that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._common import ema
from fmeta.optimizers._features import clamped_rsqrt
from fmeta.optimizers._fused import in_memory, layer
from fmeta.optimizers._normalized_mlp_net import DECAYS, RMS_DECAY, clamped

__all__ = ["example_kernels", "example_matrices", "example_sides", "features", "kernels"]
__all__ += ["matrices", "raw_kernels", "raw_matrices", "sides_of_kernels"]

_EPS = 1e-9


class Layers(NamedTuple):
    """Of the network: ``w0`` as in `main_columns`, the others as ``(out, in)``, ``b2`` ``(1)``."""

    w0: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class SideLayers(NamedTuple):
    """The first layer's part of rows and columns, in the order of ``first`` and ``second``.

    Attributes:
        b0: ``(8)``.
        columns: ``(2, 8, 6)``.
        is_row: which of the two are the rows, ``(2)``.
    """

    b0: Tensor
    columns: Tensor
    is_row: Tensor


_LAYERS: list[tuple[int, ...]] = [(8, 18), (8, 8), (8,), (8,), (1,)]
_SIDES: list[tuple[int, ...]] = [(8,), (2, 8, 6)]
# Sizes to record with: no two axes that may differ are of one size. (Nothing is without axes: torch
# would take a number in float64 for one of Python, and want to know it.)
_B, _O, _K, _I = 4, 96, 9, 64


def features(
    moments: Sequence[Tensor], row: Sequence[Tensor], col: Sequence[Tensor], p: Tensor, g: Tensor
) -> list[Tensor]:
    """The 18 features in the order of `main_columns`, of a clamped gradient."""
    *m, rms = moments
    root = torch.rsqrt(rms + 1e-8)
    factor = [r * c for r, c in zip(row, col, strict=True)]
    own = [g, torch.clamp(g, -0.1, 0.1), p, *m, rms]
    own += [*(x * root for x in m), root]
    by_factor = [*(f * g for f in factor), g * root]
    return [*own, *by_factor, *(x * f for x, f in zip(m, factor, strict=True))]


# -- matrices ----------------------------------------------------------------------------------


def matrices(*given: Tensor) -> list[Tensor]:
    """Normalised directions times ``rate``, ``(B, r, c)``; the state is changed in place.

    Args:
        *given: of `Layers`, of `SideLayers`, ``rate``, ``m0, m1, m2, rms``, ``first``, ``second``,
            parameters, gradients.
    """
    step, zero, rate = _directions_of_matrices(given)
    mean = (step + zero).square().mean(-1, keepdim=True).mean(-2, keepdim=True)
    return [step * in_memory(rate * torch.rsqrt(mean + _EPS))]


def raw_matrices(*given: Tensor) -> list[Tensor]:
    """`matrices` without the normalisation and ``rate``."""
    return [_directions_of_matrices(given)[0]]


def _directions_of_matrices(given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    net, sides = Layers(*given[:5]), SideLayers(*given[5:8])
    rate, *old, first, second, p, g = given[8:]
    g = clamped(g)
    square = g * g
    row = _side(sides, 0, first, square.mean(-1), own=-1, matrix=-1)
    col = _side(sides, 1, second, square.mean(-2), own=-1, matrix=-1)
    zero = row.zero[:, 0].unsqueeze(-1) + col.zero[:, 0].unsqueeze(-2)
    new = _moments(old, g)
    factors = row.factors.unsqueeze(-1).unbind(1), col.factors.unsqueeze(-2).unbind(1)
    rows = features(new, *factors, p, g)
    # Over rows first: a loop over a row needs no care for many small terms.
    squares = torch.stack([(x + zero).square().mean(-1).mean(-1) for x in rows], -1)
    w0 = in_memory(net.w0 * torch.rsqrt(squares + _EPS).unsqueeze(1))
    pairs = zip(row.bias.unbind(1), col.bias.unbind(1), strict=True)
    units = [r.unsqueeze(-1) + c.unsqueeze(-2) for r, c in pairs]
    for i, x in enumerate(units):
        for j, feature in enumerate(rows):
            x = torch.addcmul(x, feature, w0[:, i, j, None, None])
        units[i] = x
    step = in_memory(_later_layers(net, units))
    _write(old, new)
    first.copy_(row.moments)
    second.copy_(col.moments)
    return step, zero, rate


# -- kernels -----------------------------------------------------------------------------------


def sides_of_kernels(*given: Tensor) -> list[Tensor]:
    """Factors, biases and zeros of rows and columns, ``(B, o, 12, k)``, ``(B, 12, k, i)``.

    Args:
        *given: of `SideLayers`, ``first``, ``second``, which are changed in place, and gradients,
            ``(B, o, k, i)``.
    """
    *sides, first, second, g = given
    square = clamped(g).square()
    row = _side(SideLayers(*sides), 0, first, square.mean(-1), own=-2, matrix=-1)
    col = _side(SideLayers(*sides), 1, second, square.mean(1), own=-1, matrix=-2)
    first.copy_(row.moments)
    second.copy_(col.moments)
    row_parts, col_parts = (torch.cat([x.factors, x.bias, x.zero], 1) for x in (row, col))
    return [row_parts.transpose(1, 2).contiguous(), col_parts]


def kernels(*given: Tensor) -> list[Tensor]:
    """Normalised directions times ``rate``, ``(B, o, k, i)``; the moments are changed in place.

    Args:
        *given: of `Layers`, ``rate``, ``m0, m1, m2, rms``, what `sides_of_kernels` gives,
            parameters, gradients.
    """
    step, rate = _directions_of_kernels(given)
    mean = step.square().mean(2, keepdim=True)
    return [step * in_memory(rate * torch.rsqrt(mean + _EPS))]


def raw_kernels(*given: Tensor) -> list[Tensor]:
    """`kernels` without the normalisation and ``rate``."""
    return [_directions_of_kernels(given)[0]]


def _directions_of_kernels(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    net = Layers(*given[:5])
    rate, *old, first, second, p, g = given[5:]
    *of_row, row_zero = [x.unsqueeze(-1) for x in first.unbind(2)]
    *of_col, col_zero = [x.unsqueeze(1) for x in second.unbind(1)]
    zero, d = row_zero + col_zero, len(DECAYS)
    g = clamped(g)
    new = _moments(old, g)
    rows = features(new, of_row[:d], of_col[:d], p, g)
    # Of sums, not of means: what a mean would divide by is in the weights.
    size = g.shape[2]
    sums = [(x + zero).square().sum(2, keepdim=True) for x in rows]
    line = row_zero[:, :, :1] + col_zero[:, :, :1] + size * _EPS
    rows = [x * in_memory(torch.rsqrt(y + line)) for x, y in zip(rows, sums, strict=True)]
    w0 = in_memory(net.w0 * size**0.5)
    units = layer(rows, w0, [r + c for r, c in zip(of_row[d:], of_col[d:], strict=True)])
    step = in_memory(_later_layers(net, units))
    _write(old, new)
    return step, rate


# -- parts -------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Of rows or of columns.

    Attributes:
        moments, factors, bias: ``(B, decays or units, ...)``.
        zero: ``(B, 1, ...)``. Where it is added, a loop has the axes that rows and columns give
            it; without, torch takes what reads nothing else for a line of numbers, and goes over it
            in a loop of its own.
    """

    moments: Tensor
    factors: Tensor
    bias: Tensor
    zero: Tensor


def _side(given: SideLayers, i: int, old: Tensor, mean: Tensor, own: int, matrix: int) -> _Side:
    """What is known of rows or columns alone.

    Args:
        i: 0 for ``first``, 1 for ``second``.
        old: their second moments.
        mean: of the squared gradient.
        own, matrix: the axis of rows or columns, and that over which features are normalised.
    """
    mean = in_memory(mean) + 1e-30
    pairs = zip(old.unbind(1), DECAYS, strict=True)
    new = in_memory(torch.stack([torch.lerp(x, mean, 1 - d) for x, d in pairs], 1))
    # Rows are divided by their mean, columns are not.
    share = torch.where(given.is_row[i], new.mean(own, keepdim=True) + _EPS, 1.0)
    factors = in_memory(clamped_rsqrt(new / in_memory(share)))
    # Which torch does not know to be zero.
    zero = in_memory(torch.lt(factors[:, :1], 0).to(old.dtype))
    seen = in_memory(torch.cat([new, torch.rsqrt(new + 1e-8)], 1))
    scale = in_memory(torch.rsqrt(seen.square().mean(matrix, keepdim=True) + _EPS))
    units = (-1, *[1] * (old.ndim - 2))
    bias = zero if i else zero + given.b0.view(units)
    for j, (x, y) in enumerate(zip(seen.unbind(1), scale.unbind(1), strict=True)):
        weights = given.columns[i, :, j].view(units)
        bias = torch.addcmul(bias, (x * y).unsqueeze(1), weights)
    return _Side(new, factors, in_memory(bias), zero)


def _moments(old: Sequence[Tensor], g: Tensor) -> list[Tensor]:
    new = [ema(m, g, decay) for m, decay in zip(old[:3], DECAYS, strict=True)]
    return [*new, ema(old[3], g * g, RMS_DECAY)]


def _later_layers(net: Layers, units: list[Tensor]) -> Tensor:
    units = layer([torch.relu(u) for u in units], net.w1, net.b1.unbind(0))
    return layer([torch.relu(u) for u in units], net.w2.unsqueeze(0), net.b2.unbind(0))[0]


def _write(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for before, after in zip(old, new, strict=True):
        before.copy_(after)


# -- what to record with -----------------------------------------------------------------------


def example_matrices(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    make, d = _maker(device, dtype), len(DECAYS)
    plane: tuple[int, ...] = (_B, _O, _I)
    state = [*[plane] * 4, (_B, d, _O), (_B, d, _I)]
    return [*make(_LAYERS), *_example_of_sides(make, device), *make([(1,), *state, plane, plane])]


def example_sides(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    make, d = _maker(device, dtype), len(DECAYS)
    shapes: list[tuple[int, ...]] = [(_B, d, _O, _K), (_B, d, _K, _I), (_B, _O, _K, _I)]
    return [*_example_of_sides(make, device), *make(shapes)]


def example_kernels(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    make, each = _maker(device, dtype), len(DECAYS) + 8 + 1
    plane: tuple[int, ...] = (_B, _O, _K, _I)
    rest = [(1,), *[plane] * 4, (_B, _O, each, _K), (_B, each, _K, _I), plane, plane]
    return make([*_LAYERS, *rest])


def _maker(
    device: torch.device, dtype: torch.dtype
) -> Callable[[list[tuple[int, ...]]], list[Tensor]]:
    return lambda shapes: [torch.ones(s, device=device, dtype=dtype) for s in shapes]


def _example_of_sides(
    make: Callable[[list[tuple[int, ...]]], list[Tensor]], device: torch.device
) -> list[Tensor]:
    return [*make(_SIDES), torch.tensor([True, False], device=device)]
