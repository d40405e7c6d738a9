"""`normalized_mlp` compiled: a few loops over a tensor, without temporaries.

The loops are in `fmeta.optimizers._normalized_mlp_loops`. Several tensors of one shape go together,
in the order of axes of `Form`; their state lies in memory in that order and is changed in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta.optimizers import _forms
from fmeta.optimizers import _normalized_mlp_loops as loops
from fmeta.optimizers._features import factored_axes
from fmeta.optimizers._forms import SHORT, Form, taken
from fmeta.optimizers._fused import recorded
from fmeta.optimizers._normalized_mlp_net import (
    DECAYS,
    MOMENTS,
    axes_of,
    main_columns,
    normalized_delta,
    side_columns,
)

__all__ = ["Weights", "form_of", "fused", "start_in"]

Tree = Any

# Coordinates of kernels that go together; what a call reads and writes stays in the cache.
_PART = 2**18


@functools.lru_cache(maxsize=2**12)
def form_of(shape: tuple[int, ...], batch: int) -> Form | None:
    """The form for tensors whose features are normalised over the last two axes of a leaf.

    The matrices over which they are may be all of ``r`` and ``c``, or the ``k`` numbers of a
    kernel. None where the two largest axes are neither the last two nor the two before them.

    Args:
        shape: of a leaf, or of a stack along ``batch`` leading axes.
    """
    n, decays = len(shape), len(DECAYS)
    if n - batch < 2:
        return None
    pair = {axis + batch for axis in factored_axes(shape[batch:])}
    if n >= batch + 4 and pair == {n - 4, n - 3} and shape[-3] >= SHORT:
        # Leading axes of a leaf are those of a stack, too.
        return _forms.form_of(shape, n - 4, decays)
    if pair != {n - 2, n - 1} or shape[-1] < SHORT:
        return None
    plane, first, second, rows_first = _forms.form_of(shape, n - 2, decays)
    b, r, _, c = plane.sizes
    return Form(
        plane._replace(sizes=(b, r, c)),
        first._replace(sizes=(b, decays, r)),
        second._replace(sizes=(b, decays, c)),
        rows_first,
    )


def start_in(form: Form, p: Tensor) -> dict[str, Tensor]:
    """The first hidden state of a leaf, in memory as the compiled loops go over it."""
    parts = form.parts(MOMENTS)
    return {k: parts[k].back(p.new_zeros(parts[k].sizes)) for k in (*MOMENTS, "row", "col")}


class Weights:
    """What the weights mean, in the order in which the compiled functions take them."""

    def __init__(self, th: Tree) -> None:
        layers = [main_columns(th), th["w1"].mT, th["b1"], th["w2"].select(1, 0), th["b2"][:1]]
        self.layers = [x.clone(memory_format=torch.contiguous_format) for x in layers]
        self._b0, (row, col) = th["b0"].clone(), side_columns(th)
        self._columns = [torch.stack([row, col]), torch.stack([col, row])]
        of_row = torch.tensor([True, False], device=row.device)
        self._is_row = [of_row, of_row.logical_not()]
        self._room = self._b0[:0]

    def sides(self, form: Form) -> list[Tensor]:
        at = 0 if form.rows_first else 1
        return [self._b0, self._columns[at], self._is_row[at]]

    def contiguous(self, x: Tensor) -> Tensor:
        """``x`` in memory that the next one takes.

        Large memory that is freed may go back to the system, which clears what it then gives.
        """
        if self._room.numel() < x.numel():
            self._room = x.new_empty(x.numel())
        return self._room[: x.numel()].view(x.shape).copy_(x)


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
    state, new = taken(form.parts(MOMENTS), h, p, own)
    each = isinstance(lr, Tensor) and lr.ndim > 0
    rate = p.new_ones(1) if each else torch.as_tensor(-lr, dtype=p.dtype, device=p.device)
    run = _run_kernels if len(form.plane.sizes) == 4 else _run_matrices
    given = p.detach().contiguous(), g.detach().contiguous()
    delta = run(weights, form, rate.reshape(1), state, *given, raw=post is not None)
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


def _run_matrices(
    weights: Weights,
    form: Form,
    rate: Tensor,
    state: list[Tensor],
    p: Tensor,
    g: Tensor,
    raw: bool,
) -> Tensor:
    sizes, shape = form.plane.sizes, p.shape
    fn = loops.raw_matrices if raw else loops.matrices
    run = recorded(fn, loops.example_matrices, p.device, p.dtype)
    sides = weights.sides(form)
    (delta,) = run(*weights.layers, *sides, rate, *state, p.view(sizes), g.view(sizes))
    return delta.view(shape)


def _run_kernels(
    weights: Weights,
    form: Form,
    rate: Tensor,
    state: list[Tensor],
    p: Tensor,
    g: Tensor,
    raw: bool,
) -> Tensor:
    stack, o, k, i = form.plane.sizes

    def turned(x: Tensor) -> Tensor:
        return x.permute(form.plane.order).view(stack, o, k, i)

    seen, g = turned(p), weights.contiguous(turned(g))
    run = recorded(loops.sides_of_kernels, loops.example_sides, p.device, p.dtype)
    first, second = run(*weights.sides(form), *state[4:], g)
    fn = loops.raw_kernels if raw else loops.kernels
    run = recorded(fn, loops.example_kernels, p.device, p.dtype)
    step = _cut(stack, o, k * i, p.device.type == "cpu")
    if step is None:
        given = *state[:4], first, second, seen.contiguous(), g
        (delta,) = run(*weights.layers, rate, *given)
        return form.plane.back(delta)
    delta = torch.empty_like(p)
    out = turned(delta)
    for b in range(stack):
        for a in range(0, o, step):
            at, rows = slice(b, b + 1), slice(a, a + step)
            moments = [x[at, rows] for x in state[:4]]
            given = *moments, first[at, rows], second[at], seen[at, rows].contiguous(), g[at, rows]
            out[at, rows].copy_(run(*weights.layers, rate, *given)[0])
    return delta


def _cut(stack: int, o: int, row: int, cached: bool) -> int | None:
    """How many of ``o`` go together on a CPU, about `_PART` coordinates; None: all of the stack."""
    if not cached or stack * o * row <= 2 * _PART:
        return None
    return -(-o // -(-o * row // _PART))
