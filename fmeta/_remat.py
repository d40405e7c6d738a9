"""Rematerialisation: keep a function's inputs, compute its insides again when they are needed.

`torch.utils.checkpoint` does not compose with `torch.func`. Here the function runs inside one
`autograd.Function` with rules for reverse mode, forward mode and vmap; its backward is the vjp of
the recomputed function and is *itself* such a Function, so that any order and nesting works.

Reference: Griewank, Walther, "Algorithm 799: Revolve" (2000); Chen et al. 1604.06174.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import _autodiff, trees

__all__ = ["remat", "remat_keeping"]

FlatFn = Callable[..., tuple[Tensor, ...]]


def remat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, saving only its arguments for the backward pass.

    Args:
        fn: pure function of trees of tensors, returning a tree of tensors. It must not close over
            a tensor that is being differentiated or batched (see ``fmeta._guard``).

    Returns:
        A function with the same values and the same derivatives of every order and kind.
    """

    @functools.wraps(fn)
    def wrapped(*args: Any) -> Any:
        inputs, rebuild = trees.tensors(args)
        rebuild_result: list[Any] = []  # known after the first run

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            outputs, rebuilder = trees.tensors(fn(*rebuild(values)))
            rebuild_result[:] = [rebuilder]
            return _distinct(outputs, values)

        outputs = _Remat.apply(flat, *inputs)
        return rebuild_result[0](outputs)

    return wrapped


def remat_keeping(fn: Callable[..., tuple[Any, Any]], again: Callable[..., Any]) -> Any:
    """As `remat`, but some of what was found on the way is kept, to make the second time cheaper.

    Args:
        fn: ``fn(*args) -> (result, kept)``, trees of tensors.
        again: ``again(kept, *args) -> result``, which may take values from ``kept``, but whose
            derivatives must be those of the function of ``args`` alone: ``kept`` is a constant.

    Returns:
        A function of ``args`` that gives the result.
    """

    def wrapped(*args: Any) -> Any:
        inputs, rebuild = trees.tensors(args)
        known: list[Any] = []

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            result, kept = fn(*rebuild(values))
            outputs, rebuild_result = trees.tensors(result)
            found, rebuild_kept = trees.tensors(kept)
            known[:] = [len(outputs), rebuild_result, rebuild_kept]
            return _distinct([*outputs, *found], values)

        def flat_again(*values: Tensor) -> tuple[Tensor, ...]:
            args, kept = values[: len(inputs)], values[len(inputs) :]
            outputs = trees.tensors(again(known[2](kept), *rebuild(args)))[0]
            return _distinct(outputs, values)

        everything = _Keeping.apply(flat, flat_again, lambda: known[0], *inputs)
        return known[1](everything[: known[0]])

    return wrapped


def _distinct(outputs: list[Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An autograd.Function must return new tensors: no input, none twice."""
    seen = {id(x) for x in inputs}
    result = []
    for x in outputs:
        result.append(x.view_as(x) if id(x) in seen else x)
        seen.add(id(x))
    return tuple(result)


class _Remat(torch.autograd.Function):
    """``apply(fn, *tensors)``; forward runs below every functorch level, on plain tensors."""

    @staticmethod
    def forward(fn: FlatFn, *args: Tensor) -> tuple[Tensor, ...]:
        return fn(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fn, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args)
        ctx.save_for_forward(*args)
        ctx.differentiable = [_autodiff.is_differentiable(x) for x in output]
        ctx.mark_non_differentiable(*[x for x in output if not _autodiff.is_differentiable(x)])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        def pull(*which: Any) -> FlatFn:
            return functools.partial(_vjp, ctx.fn, *which)

        grads = pulled_back(ctx.saved_tensors, ctx.needs_input_grad[1:], cotangents, pull)
        return (None, *grads)

    @staticmethod
    def jvp(ctx: Any, _fn: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        args = ctx.saved_tensors
        wrt = tuple(i for i, t in enumerate(tangents) if t is not None)
        push = functools.partial(_jvp, ctx.fn, wrt, len(args))
        out = _Remat.apply(push, *args, *[t for t in tangents if t is not None])
        # A result that does not depend on the input comes back as itself, without a tangent.
        return tuple(x if d else None for x, d in zip(out, ctx.differentiable, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], fn: FlatFn, *args: Tensor) -> Any:
        batched = functools.partial(_vmap, fn, tuple(in_dims[1:]), info.randomness)
        out = _Remat.apply(batched, *args)
        return out, (0,) * len(out)


class _Keeping(torch.autograd.Function):
    """``apply(fn, again, count, *tensors) -> (*count() results, *kept)``."""

    @staticmethod
    def forward(fn: FlatFn, again: FlatFn, count: Any, *args: Tensor) -> tuple[Tensor, ...]:
        return fn(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fn, ctx.again, count, *args = inputs
        ctx.count, ctx.inputs = count(), len(args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args, *output[ctx.count :])
        ctx.save_for_forward(*args)
        ctx.differentiable = [
            i < ctx.count and _autodiff.is_differentiable(x) for i, x in enumerate(output)
        ]
        constants = zip(output, ctx.differentiable, strict=True)
        ctx.mark_non_differentiable(*[x for x, d in constants if not d])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        def pull(*which: Any) -> FlatFn:
            return functools.partial(_vjp, ctx.again, *which)

        needed = (*ctx.needs_input_grad[3:], *[False] * (len(cotangents) - ctx.count))
        grads = pulled_back(ctx.saved_tensors, needed, cotangents[: ctx.count], pull)
        return (None, None, None, *grads[: ctx.inputs])

    @staticmethod
    def jvp(ctx: Any, _fn: None, _again: None, _count: None, *tangents: Tensor | None) -> Any:
        args = ctx.saved_tensors[: ctx.inputs]
        wrt = tuple(i for i, t in enumerate(tangents) if t is not None)
        push = functools.partial(_jvp, ctx.fn, wrt, len(args))
        out = _Remat.apply(push, *args, *[t for t in tangents if t is not None])
        return tuple(x if d else None for x, d in zip(out, ctx.differentiable, strict=True))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], fn: FlatFn, again: FlatFn, count: Any, *args: Tensor
    ) -> Any:
        dims = tuple(in_dims[3:])

        def batched_again(*values: Tensor) -> Any:
            kept = (0,) * (len(values) - len(args))
            return _vmap(again, (*dims, *kept), info.randomness, *values)

        batched = functools.partial(_vmap, fn, dims, info.randomness)
        out = _Keeping.apply(batched, batched_again, count, *args)
        return out, (0,) * len(out)


def pulled_back(
    args: tuple[Tensor, ...],
    needed: tuple[bool, ...],
    cotangents: tuple[Tensor | None, ...],
    pull: Callable[..., FlatFn],
) -> list[Tensor | None]:
    """Gradients of ``args`` where they are needed, themselves recomputed when differentiated.

    Args:
        args: the saved inputs.
        needed: which of them need a gradient.
        cotangents: of the outputs, ``None`` where there is none.
        pull: ``pull(wrt, out, len(args)) -> fn(*args, *given cotangents) -> gradients of wrt``.
    """
    flags = zip(args, needed, strict=True)
    wrt = tuple(i for i, (x, n) in enumerate(flags) if n and _autodiff.is_differentiable(x))
    out = tuple(i for i, c in enumerate(cotangents) if c is not None)
    grads: list[Tensor | None] = [None] * len(args)
    if wrt and out:
        given = [c for c in cotangents if c is not None]
        found = _Remat.apply(pull(wrt, out, len(args)), *args, *given)
        for i, g in zip(wrt, found, strict=True):
            grads[i] = g
    return grads


def _vjp(
    fn: FlatFn, wrt: tuple[int, ...], out: tuple[int, ...], n: int, *flat: Tensor
) -> tuple[Tensor, ...]:
    args, cotangents = flat[:n], flat[n:]

    def partial(*inputs: Tensor) -> tuple[Tensor, ...]:
        result = fn(*_filled(args, wrt, inputs))
        return tuple(result[i] for i in out)

    return _distinct(list(_autodiff.vjp(partial, [args[i] for i in wrt], cotangents)), flat)


def _jvp(fn: FlatFn, wrt: tuple[int, ...], n: int, *flat: Tensor) -> tuple[Tensor, ...]:
    args, tangents = flat[:n], flat[n:]
    try:
        out = torch.func.jvp(
            lambda *inputs: fn(*_filled(args, wrt, inputs)), tuple(args[i] for i in wrt), tangents
        )[1]
    except RuntimeError as error:
        if "Nested forward mode AD" not in str(error):
            raise
        raise ValueError(
            "forward_ad.dual_level does not go through a recomputed function (checkpoint=, "
            "mixed_mode=): use torch.func.jvp"
        ) from error
    return _distinct(list(out), flat)


def _vmap(fn: FlatFn, in_dims: tuple[Any, ...], randomness: str, *args: Tensor) -> Any:
    return torch.vmap(fn, in_dims=in_dims, randomness=randomness)(*args)


def _filled(args: tuple[Tensor, ...], wrt: tuple[int, ...], values: Any) -> list[Tensor]:
    full = list(args)
    for i, value in zip(wrt, values, strict=True):
        full[i] = value
    return full
