"""The loops of `adafactor_mlp` that are compiled: three passes over a stack of tensors.

What they compute is what `fmeta.optimizers._adafactor_mlp_net` computes; see there for the
formulas. The passes are cut at the means over rows and columns and at the features' root mean
squares. Tensors come as ``(B, o, k, i)``, see `fmeta.optimizers._forms.form_of`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._coordinate_net import EPS
from fmeta.optimizers._features import clamped_rsqrt
from fmeta.optimizers._fused import in_memory
from fmeta.optimizers._network_op import network

__all__ = ["Sizes", "features", "loops_of"]


class Sizes(NamedTuple):
    """What a loop is compiled for.

    Attributes:
        momenta, rms: numbers of these; there are as many factored second moments as momenta.
        units: of the hidden layers.
    """

    momenta: int
    rms: int
    units: tuple[int, ...]

    @property
    def features(self) -> int:
        """Those that differ from coordinate to coordinate."""
        return 2 + 4 * self.momenta + 2 * self.rms


class _Given(NamedTuple):
    """What a call is given.

    Attributes:
        rates: ``1 - decay`` of momenta and second moments, ``(planes)``.
        second_rates: of factored second moments, ``(decays)``.
        columns: the first layer, ``(units, features)``.
        sides: that of what lacks i and of what lacks o, ``(2, units, 2 * decays)``.
        is_row: which of the two are the rows, ``(2)``.
        bias: of the first layer, ``(B, units)``.
        layers: those after the first, weights and biases in turns.
        planes: momenta and second moments, ``(B, o, k, i)``, changed in place.
        first, second: factored second moments, ``(B, decays, o, k)``, ``(B, decays, k, i)``,
            changed in place.
        p, g: parameters and gradients.
    """

    rates: Tensor
    second_rates: Tensor
    columns: Tensor
    sides: Tensor
    is_row: Tensor
    bias: Tensor
    layers: Sequence[Tensor]
    planes: Sequence[Tensor]
    first: Tensor
    second: Tensor
    p: Tensor
    g: Tensor


@functools.cache
def loops_of(
    sizes: Sizes,
) -> tuple[Callable[..., list[Tensor]], Callable[[torch.device, torch.dtype], Sequence[Tensor]]]:
    """``(loops, example)``: the function to compile, of the tensors of a call, and some of these.

    ``loops`` returns ``[delta]``, ``(B, o, k, i)``.
    """
    layers, planes = 2 * len(sizes.units), sizes.momenta + sizes.rms

    def loops(*x: Tensor) -> list[Tensor]:
        rates, second_rates, columns, sides, is_row, bias, *_ = x
        of_net, of_state = x[6 : 6 + layers], x[6 + layers : 6 + layers + planes]
        *_, first, second, p, g = x
        before = (rates, second_rates, columns, sides, is_row, bias)
        return [_steps(_Given(*before, of_net, of_state, first, second, p, g), sizes)]

    def example(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        n, (first, *_) = sizes.momenta, sizes.units
        # No two axes that may differ are of one size, and none is of one that is fixed.
        fixed = {*sizes.units, n, 2 * n, planes, sizes.features, 1, 2}
        free = (size for size in itertools.count(3) if size not in fixed)
        b, k = next(free), next(free)
        o, i = next(s for s in free if s > 40), next(s for s in free if s > 90)
        shapes: list[tuple[int, ...]] = [(planes,), (n,), (first, sizes.features)]
        shapes += [(2, first, 2 * n), (2,), (b, first)]
        for inputs, outputs in itertools.pairwise((*sizes.units, 2)):
            shapes += [(outputs, inputs), (outputs,)]
        shapes += [*[(b, o, k, i)] * planes, (b, n, o, k), (b, n, k, i), (b, o, k, i), (b, o, k, i)]
        made = [torch.ones(s, device=device, dtype=dtype) for s in shapes]
        made[4] = torch.tensor([True, False], device=device)
        return made

    return loops, example


def features(
    moments: Sequence[Tensor],
    momenta: int,
    row: Sequence[Tensor],
    col: Sequence[Tensor],
    p: Tensor,
    g: Tensor,
) -> list[Tensor]:
    """The features in the order of `Net.columns`."""
    m, v = moments[:momenta], moments[momenta:]
    root = [torch.rsqrt(x + 1e-6) for x in v]
    factor = [r * c for r, c in zip(row, col, strict=True)]
    over_root = [x * root[min(i, len(root) - 1)] for i, x in enumerate(m)]
    by_factor = [x * f for x, f in zip(m, factor, strict=True)]
    return [g, p, *m, *v, *over_root, *root, *(f * g for f in factor), *by_factor]


def _steps(x: _Given, sizes: Sizes) -> Tensor:
    momenta = sizes.momenta
    square = x.g * x.g
    first = _side(x, 0, x.first, square.mean(3))
    second = _side(x, 1, x.second, square.mean(1))
    zero = first.zero.unsqueeze(3) + second.zero.unsqueeze(1)
    values = [x.g] * momenta + [square] * (len(x.planes) - momenta)
    pairs = zip(x.planes, values, x.rates.unbind(0), strict=True)
    new = [torch.lerp(old, value, rate) for old, value, rate in pairs]
    factors = [y.unsqueeze(3) for y in first.factors], [y.unsqueeze(1) for y in second.factors]
    rows = features(new, momenta, *factors, x.p, x.g)
    # Over rows first: a loop over a row needs no care for many small terms.
    means = [(y + zero).square().mean(3).mean((1, 2)) for y in rows]
    columns = in_memory(x.columns * torch.rsqrt(torch.stack(means, -1) + EPS).unsqueeze(1))
    delta = in_memory(network(rows, [first.bias, second.bias], [columns, *x.layers], sizes.units))
    for old, value in zip(x.planes, new, strict=True):
        old.copy_(value)
    x.first.copy_(torch.stack(first.moments, 1))
    x.second.copy_(torch.stack(second.moments, 1))
    return delta


class _Side(NamedTuple):
    """Of rows or of columns.

    Attributes:
        moments, factors: a tensor for each decay.
        bias: their part of the first layer, ``(B, units, *)``.
        zero: of the shape of a factor. Where it is added, a loop has the axes that rows and columns
            give it; without, torch takes what reads nothing else for a line of numbers, and goes
            over it in a loop of its own.
    """

    moments: list[Tensor]
    factors: list[Tensor]
    bias: Tensor
    zero: Tensor


def _side(x: _Given, i: int, old: Tensor, mean: Tensor) -> _Side:
    """What is known of rows or columns alone.

    Args:
        i: 0 for ``first``, 1 for ``second``.
        old: their second moments.
        mean: of the squared gradient.
    """
    own = 1 if i == 0 else 2  # their axis of o or of i
    pairs = zip(old.unbind(1), x.second_rates.unbind(0), strict=True)
    new = _stored([torch.lerp(y, mean + 1e-30, rate) for y, rate in pairs])
    # Rows are divided by their mean, columns are not.
    share = [torch.where(x.is_row[i], y.mean(own, keepdim=True) + 1e-9, 1.0) for y in new]
    factors = [clamped_rsqrt(y / z) for y, z in zip(new, _stored(share), strict=True)]
    zero = torch.lt(factors[0], 0).to(old.dtype)  # which torch does not know to be zero
    *factors, zero = _stored([*factors, zero])
    seen = [*new, *(torch.rsqrt(y + 1e-8) for y in new)]
    scale = _stored([torch.rsqrt(y.square().mean((1, 2), keepdim=True) + EPS) for y in seen])
    scaled = in_memory(torch.stack([y * z for y, z in zip(seen, scale, strict=True)], 1))
    columns = x.sides[i].expand(old.shape[0], -1, -1)
    bias = torch.bmm(columns, scaled.flatten(2)).unflatten(2, old.shape[2:])
    return _Side(new, factors, bias + x.bias[:, :, None, None] if i == 0 else bias, zero)


def _stored(rows: Sequence[Tensor]) -> list[Tensor]:
    return list(in_memory(torch.stack(list(rows))).unbind(0))
