"""Gradients that are the same function inside and outside of torch.func transforms.

Below all transforms (nothing wraps the tensors) plain autograd does the same as `torch.func` with
less overhead and less memory (pytorch issue 134612), so it is used there. Directly under one `vmap`
the gradients of all members of the batch are those of the sum of their losses, again below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd.graph import get_gradient_edge

from fmeta import trees
from fmeta._norms import norms_written_out

__all__ = [
    "grad_and_value",
    "inside_transform",
    "is_differentiable",
    "is_differentiating",
    "is_pulled_back_to",
    "vjp",
]


_functorch = torch._C._functorch
_nested: ContextVar[bool] = ContextVar("_nested", default=False)


@contextmanager
def nested() -> Iterator[None]:
    """Within it gradients are taken by torch.func, on levels of their own."""
    token = _nested.set(True)
    try:
        yield
    finally:
        _nested.reset(token)


def inside_transform() -> bool:
    """Whether a torch.func transform (or torch.compile's tracer) is active."""
    return (
        torch.compiler.is_compiling()
        or _functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0  # `detach` would drop the tangents
        or _nested.get()
    )


def is_differentiating() -> bool:
    """Whether what is computed now may be differentiated, in reverse or in forward mode."""
    if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return True
    kinds = _functorch.TransformType.Grad, _functorch.TransformType.Jvp
    return any(i.key() in kinds for i in _functorch.get_interpreter_stack() or ())


def is_differentiable(x: Any) -> bool:
    """Whether ``x`` is a tensor of a dtype that has derivatives."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def is_pulled_back_to(x: Tensor) -> bool:
    """Whether a `torch.func.grad` or `vjp` that is active takes a derivative with respect to x."""
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is None:
        return False
    kinds = {i.level(): i.key() for i in _functorch.get_interpreter_stack()}
    while _functorch.is_functorch_wrapped_tensor(x):
        kind = kinds.get(_functorch.maybe_get_level(x))
        if kind == _functorch.TransformType.Grad and x.requires_grad:
            return True
        x = _functorch.get_unwrapped(x)
    return False


def grad_and_value(
    fn: Callable[..., tuple[Tensor, Any]], params: Any, *args: Any
) -> tuple[Any, tuple[Tensor, Any]]:
    """Gradient with respect to ``params`` of a function that returns ``(loss, aux)``.

    As `torch.func.grad_and_value` with ``has_aux=True``: differentiable again, and with respect to
    whatever else the function reads.

    Args:
        fn: ``fn(params, *args) -> (scalar, aux)``.
        params: tree of floating tensors.
        *args: further trees, constants of this gradient.

    Returns:
        ``(grads, (loss, aux))``.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        # Nothing can be recorded in inference mode, nor with tensors that were made in it.
        with torch.inference_mode(False), torch.no_grad():
            copies = trees.map(lambda x: x.clone() if isinstance(x, Tensor) else x, (params, args))
            return grad_and_value(fn, copies[0], *copies[1])
    if _directly_under_vmap(params, args):
        return _per_member(fn, params, args)
    flat, spec = trees.flatten(params)
    recording = torch.is_grad_enabled()
    visible = recording and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*flat, *trees.leaves(args))
    )
    if inside_transform() or (recording and not visible):
        # `recording and not visible`: `fn` may still close over a tensor that requires grad, and
        # only torch.func keeps that graph without making every result require grad.
        rebuild_aux: list[Any] = []  # torch.func lets only tensors out

        def flat_fn(flat: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
            loss, aux = fn(trees.unflatten(spec, flat), *args)
            check_scalar(loss)
            found, rebuilder = trees.tensors(aux)
            rebuild_aux[:] = [rebuilder]
            return loss, tuple(found)

        with norms_written_out():
            grads, (loss, found) = torch.func.grad_and_value(flat_fn, has_aux=True)(tuple(flat))
        aux = rebuild_aux[0](found)
        return trees.unflatten(spec, grads), (loss, aux)
    with torch.enable_grad():
        # Fresh aliases: a parameter may also be one of `args` (a proximal term), as a constant.
        inputs = [
            x.view_as(x) if visible and x.requires_grad else x.detach().requires_grad_()
            for x in flat
        ]
        loss, aux = fn(trees.unflatten(spec, inputs), *args)
        grads = _autograd(loss, inputs, create_graph=recording)
    if not recording:
        loss = loss.detach()
        aux = trees.map(lambda x: x.detach() if isinstance(x, Tensor) else x, aux)
    return trees.unflatten(spec, grads), (loss, aux)


def _directly_under_vmap(params: Any, args: Any) -> bool:
    """Whether `vmap` is the only transform, and what is below it is plain autograd's business."""
    if torch.compiler.is_compiling() or _nested.get():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    innermost = _functorch.peek_interpreter_stack()
    if innermost is None or _functorch.get_dynamic_layer_stack_depth() != 1:
        return False
    if innermost.key() != _functorch.TransformType.Vmap:
        return False
    tensors = [x for x in trees.leaves((params, args)) if isinstance(x, Tensor)]
    below = [_functorch.get_unwrapped(x) for x in tensors if _functorch.is_batchedtensor(x)]
    if not below:  # what is batched came by closure, and only `fn` knows it
        return False
    return not torch.is_grad_enabled() or any(x.requires_grad for x in (*tensors, *below))


def _per_member(
    fn: Callable[..., tuple[Tensor, Any]], params: Any, args: Any
) -> tuple[Any, tuple[Tensor, Any]]:
    """The gradients of all members of a batch: those of the sum of their losses, below the vmap."""
    inputs, rebuild = trees.tensors((params, args))
    spec = trees.flatten(params)[1]
    rebuild_aux: list[Any] = []

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        own, others = rebuild(values)
        loss, aux = fn(own, *others)
        check_scalar(loss)
        found, rebuilder = trees.tensors(aux)
        rebuild_aux[:] = [rebuilder]
        return (loss, *found)

    n = spec.num_leaves
    vmap: Any = retrieve_current_functorch_interpreter()
    with vmap.lower():
        batched, dims = [], []
        for i, x in enumerate(inputs):
            if _functorch.is_batchedtensor(x):
                below = _functorch.get_unwrapped(x).movedim(_functorch.maybe_get_bdim(x), 0)
            elif i < n:  # each member has a gradient of its own with respect to a shared parameter
                below = x.expand(vmap.batch_size(), *x.shape)
            else:
                below = x
            batched.append(below)
            dims.append(None if below is x else 0)
        members = torch.vmap(flat, in_dims=tuple(dims), randomness=vmap.randomness())

        def total(params: tuple[Tensor, ...], *rest: Tensor) -> tuple[Tensor, Any]:
            losses, *aux = members(*params, *rest)
            return losses.sum(), (losses, *aux)

        grads, (_, seen) = grad_and_value(total, tuple(batched[:n]), *batched[n:])
    out = [_functorch._add_batch_dim(x, 0, vmap.level()) for x in (*grads, *seen)]
    return trees.unflatten(spec, out[:n]), (out[n], rebuild_aux[0](out[n + 1 :]))


def vjp(
    fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of ``sum(<output, cotangent>)`` with respect to ``inputs``.

    Args:
        fn: function of the inputs, returning a flat tuple of floating tensors.
        inputs: tensors of floating dtype.
        cotangents: one for each output, of its shape.
    """
    if inside_transform():
        with norms_written_out():
            return torch.func.vjp(fn, *inputs)[1](tuple(cotangents), retain_graph=False)
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [
            x.view_as(x) if recording and x.requires_grad else x.detach().requires_grad_()
            for x in inputs
        ]
        # Only the edges of the graph: the outputs themselves need not live while it is walked.
        edges = [
            (get_gradient_edge(o), c)
            for o, c in zip(fn(*aliases), cotangents, strict=True)
            if o.requires_grad
        ]
        if not edges:
            return tuple(torch.zeros_like(x) for x in inputs)
        return torch.autograd.grad(
            [edge for edge, _ in edges],
            aliases,
            [c for _, c in edges],
            create_graph=recording,
            allow_unused=True,
            materialize_grads=True,
        )


def _autograd(loss: Tensor, inputs: list[Tensor], create_graph: bool) -> Sequence[Tensor]:
    check_scalar(loss)
    if not inputs:
        return []
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def check_scalar(loss: Any, name: str = "loss_fn") -> None:
    """Raises a ValueError unless the loss is a scalar tensor of floating dtype."""
    if not isinstance(loss, Tensor) or loss.shape != () or not loss.is_floating_point():
        got = (
            f"a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}"
            if isinstance(loss, Tensor)
            else f"a {type(loss).__name__}"
        )
        raise ValueError(f"{name} must return a floating scalar, got {got}: take its mean or sum")
