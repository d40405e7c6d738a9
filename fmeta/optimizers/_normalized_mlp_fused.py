"""`normalized_mlp` compiled as a whole: a few loops over a tensor, without temporaries.

What they compute is what `fmeta.optimizers._normalized_mlp_net` computes; see there for the
formulas. There are three passes: for the means of the squared gradient over rows and columns, for
the features' root mean squares, for moments and direction; and the division of the direction by its
own. Several tensors of one shape go together, in the order of axes of `Form`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._common import ema
from fmeta.optimizers._features import clamped_rsqrt, factored_axes
from fmeta.optimizers._forms import Form, Part
from fmeta.optimizers._fused import in_memory, layer, recorded
from fmeta.optimizers._normalized_mlp_net import (
    DECAYS,
    MOMENTS,
    RMS_DECAY,
    axes_of,
    clamped,
    main_columns,
    normalized_delta,
    side_columns,
)

__all__ = ["Weights", "features", "fused", "start_in"]

Tree = Any

_EPS = 1e-9


def start_in(form: Form, p: Tensor) -> dict[str, Tensor]:
    """The first hidden state of a leaf, in memory as the compiled loops go over it."""
    state = {
        k: part.back(p.new_zeros(part.sizes), _shape(k, p)) for k, part in _parts(form).items()
    }
    return {k: state[k] for k in (*MOMENTS, "row", "col")}


def _parts(form: Form) -> dict[str, Part]:
    parts = {name: form.plane for name in MOMENTS}
    return parts | dict(zip(form.names, (form.first, form.second), strict=True))


def _shape(name: str, p: Tensor) -> tuple[int, ...]:
    """Of an entry of the state of a leaf."""
    shape = tuple(p.shape)
    if name in MOMENTS:
        return shape
    without = factored_axes(shape)[1 if name == "row" else 0]
    return (*(n for i, n in enumerate(shape) if i != without), len(DECAYS))


class Weights:
    """What the weights mean, in the order in which compiled functions take them."""

    def __init__(self, th: Tree) -> None:
        layers = [main_columns(th), th["w1"].mT, th["b1"], th["w2"].select(1, 0), th["b2"][:1]]
        sides = [torch.stack(pair) for pair in (side_columns(th), side_columns(th)[::-1])]
        common = [x.clone(memory_format=torch.contiguous_format) for x in (*layers, th["b0"])]
        # Which comes first, rows or columns: weights, and flags of where the rows are.
        self._flags = [torch.tensor(pair, device=sides[0].device) for pair in _ORDERS]
        self._common, self._sides = common, sides

    def of(self, form: Form) -> list[Tensor]:
        at = 0 if form.rows_first else 1
        return [*self._common, self._sides[at], self._flags[at]]


_ORDERS = ([True, False], [False, True])


def fused(
    weights: Weights,
    form: Form,
    p: Tensor,
    g: Tensor,
    h: Mapping[str, Tensor],
    batch: int,
    lr: Any,
    weight_decay: Any,
    post: Callable[[Tensor], Tensor] | None,
    own: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Delta and new state of a tensor of at least two axes; only without derivatives.

    Args:
        batch: leading axes of ``p`` that are those of a stack.
        post: what is done to the direction before it is divided by its rms.
        own: whether the state's memory may be used for the new one.
    """
    state, new = [], {}
    for name, part in _parts(form).items():
        x = part.into(h[name].detach())
        kept = x.data_ptr() == h[name].data_ptr()
        if kept and not own:
            x, kept = x.clone(), False
        state.append(x)
        new[name] = h[name] if kept else part.back(x, tuple(h[name].shape))
    each = isinstance(lr, Tensor) and lr.ndim > 0
    rate = p.new_ones(()) if each else torch.as_tensor(-lr, dtype=p.dtype, device=p.device)
    inputs = [*weights.of(form), rate, *state, form.plane.into(p.detach())]
    run = recorded(
        *_FUNCTIONS[form.kernels, post is None],
        p.device,
        p.dtype,
    )
    (delta,) = run(*inputs, form.plane.into(g.detach()))
    delta = form.plane.back(delta, tuple(p.shape))
    if post is not None:
        axes = axes_of(tuple(p.shape), batch)
        return normalized_delta(post(delta), p, lr, weight_decay, axes), new
    if each:
        delta.mul_(-lr)
    decay = -lr * weight_decay
    if isinstance(decay, Tensor):
        delta.addcmul_(decay, p)
    elif decay:
        delta.add_(p, alpha=decay)
    return delta, new


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


# -- compiled functions ------------------------------------------------------------------------


class _Given(NamedTuple):
    """Arguments of a compiled function.

    Attributes:
        w0, w1, b1, w2, b2, b0: layers as in `main_columns` and `layers_of`, ``b2`` ``(1)``.
        sides: the first layer of rows and of columns, in the order of ``first`` and ``second``.
        is_row: which of the two is the rows.
        rate: factor of the normalised direction.
        m0, m1, m2, rms, first, second: the state, see `Form`; changed in place.
        p, g: parameter and gradient.
    """

    w0: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    b0: Tensor
    sides: Tensor
    is_row: Tensor
    rate: Tensor
    m0: Tensor
    m1: Tensor
    m2: Tensor
    rms: Tensor
    first: Tensor
    second: Tensor
    p: Tensor
    g: Tensor


def _steps_of_matrices(*given: Tensor) -> list[Tensor]:
    return _steps(_Given(*given), kernels=False, normalized=True)


def _directions_of_matrices(*given: Tensor) -> list[Tensor]:
    return _steps(_Given(*given), kernels=False, normalized=False)


def _steps_of_kernels(*given: Tensor) -> list[Tensor]:
    return _steps(_Given(*given), kernels=True, normalized=True)


def _directions_of_kernels(*given: Tensor) -> list[Tensor]:
    return _steps(_Given(*given), kernels=True, normalized=False)


def _steps(x: _Given, kernels: bool, normalized: bool) -> list[Tensor]:
    g = clamped(x.g)
    outer = -3 if kernels else -2  # the axis that the second of rows and columns lack
    square = g * g
    firsts, first_factor, first_bias = _of_side(
        x, 0, x.first, square.mean(-1), own=-2 if kernels else -1, matrix=-1
    )
    seconds, second_factor, second_bias = _of_side(
        x, 1, x.second, square.mean(outer), own=-1, matrix=-2 if kernels else -1
    )
    old = x.m0, x.m1, x.m2, x.rms
    new = [ema(m, g, decay) for m, decay in zip(old[:3], DECAYS, strict=True)]
    new.append(ema(x.rms, square, RMS_DECAY))
    first_factor, first_bias = ([y.unsqueeze(-1) for y in z] for z in (first_factor, first_bias))
    second_factor, second_bias = (
        [y.unsqueeze(outer) for y in z] for z in (second_factor, second_bias)
    )
    rows = features(new, first_factor, second_factor, x.p, g)
    bias = [r + c for r, c in zip(first_bias, second_bias, strict=True)]
    if kernels:
        rows = [row * _inverse_rms(row.square().mean(-2, keepdim=True)) for row in rows]
        units = layer(rows, x.w0, bias)
    else:
        # Over rows first: a loop over a row needs no care for many small terms.
        squares = torch.stack([row.square().mean(-1).mean(-1) for row in rows], -1)
        each = in_memory(x.w0 * torch.rsqrt(squares + _EPS).unsqueeze(1))
        units = _layer_of_each(rows, each, bias)
    units = layer([torch.relu(u) for u in units], x.w1, x.b1.unbind(0))
    (step,) = layer([torch.relu(u) for u in units], x.w2.unsqueeze(0), x.b2.unbind(0))
    step = in_memory(step)
    if normalized:
        mean = step.square().mean(-2 if kernels else -1, keepdim=True)
        mean = mean if kernels else mean.mean(-2, keepdim=True)
        step = step * in_memory(x.rate * torch.rsqrt(mean + _EPS))
    for before, after in zip(old, new, strict=True):
        before.copy_(after)
    x.first.copy_(torch.stack(firsts, 1))
    x.second.copy_(torch.stack(seconds, 1))
    return [step]


def _of_side(
    x: _Given, i: int, old: Tensor, mean: Tensor, own: int, matrix: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """New second moments, factors and biases of rows or columns, a tensor for each decay or unit.

    Args:
        i: 0 for ``first``, 1 for ``second``.
        mean: of the squared gradient.
        own, matrix: the axis of rows or columns, and that over which features are normalised.
    """
    new = [torch.lerp(old.select(1, j), mean + 1e-30, 1 - d) for j, d in enumerate(DECAYS)]
    new = _kept(new)
    # Rows are divided by their mean, columns are not.
    means = [torch.where(x.is_row[i], y.mean(own, keepdim=True) + _EPS, 1.0) for y in new]
    factors = [clamped_rsqrt(y / m) for y, m in zip(new, _kept(means), strict=True)]
    seen = [*new, *(torch.rsqrt(y + 1e-8) for y in new)]
    scales = _kept([torch.rsqrt(y.square().mean(matrix, keepdim=True) + _EPS) for y in seen])
    rows = [y * s for y, s in zip(seen, scales, strict=True)]
    zero = torch.zeros_like(new[0])
    biases = layer(rows, x.sides[i], [zero if i else zero + b for b in x.b0.unbind(0)])
    return new, _kept(factors), _kept(biases)


def _kept(rows: Sequence[Tensor]) -> list[Tensor]:
    return list(in_memory(torch.stack(list(rows))).unbind(0))


def _inverse_rms(mean: Tensor) -> Tensor:
    return in_memory(torch.rsqrt(mean + _EPS))


def _layer_of_each(rows: Sequence[Tensor], w: Tensor, bias: Sequence[Tensor]) -> list[Tensor]:
    """`layer` with weights of each matrix of a stack, ``(B, units, F)``."""
    units = []
    for i, total in enumerate(bias):
        for j, row in enumerate(rows):
            total = torch.addcmul(total, row, w[:, i, j, None, None])
        units.append(total)
    return units


def _example(kernels: bool, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Tensors to record with; no two axes that may differ are of one size."""
    stack, a, k, b = 4, 96, 9, 64
    plane = (stack, a, k, b) if kernels else (stack, a, b)
    inner = ((a, k), (k, b)) if kernels else ((a,), (b,))
    shapes: list[tuple[int, ...]] = [(8, 18), (8, 8), (8,), (8,), (1,), (8,), (2, 8, 6)]
    weights = [torch.ones(s, device=device, dtype=dtype) for s in shapes]
    weights.append(torch.tensor([True, False], device=device))
    sides = [(stack, len(DECAYS), *side) for side in inner]
    rest = [(), *[plane] * 4, *sides, plane, plane]
    return weights + [torch.ones(s, device=device, dtype=dtype) for s in rest]


_example_matrices = functools.partial(_example, False)
_example_kernels = functools.partial(_example, True)
_FUNCTIONS = {
    (False, True): (_steps_of_matrices, _example_matrices),
    (False, False): (_directions_of_matrices, _example_matrices),
    (True, True): (_steps_of_kernels, _example_kernels),
    (True, False): (_directions_of_kernels, _example_kernels),
}
