"""Mixed-mode gradients: a gradient whose own derivative is taken forward over reverse.

For a twice differentiable loss L the vector-Jacobian product of ``grad_p L`` with v is
``d/de grad L(p + e v)``, because second derivatives commute. So only the inputs are kept, and the
backward pass is one `jvp` through a gradient, whose memory is that of a single gradient.

Reference: Kemaev et al., "Scalable meta-learning via mixed-mode differentiation", 2505.00793.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import _autodiff, _guard, trees
from fmeta._remat import _filled, _Remat, pulled_back

__all__ = ["mixed_grad_and_value"]

_vjp: Any = torch.func.vjp  # its types know nothing of has_aux


def mixed_grad_and_value(
    fn: Callable[..., tuple[Tensor, Any]], params: Any, *args: Any, known: Any = None
) -> tuple[Any, tuple[Tensor, Any]]:
    """As `fmeta._autodiff.grad_and_value`, differentiated again forward over reverse.

    Args:
        fn: ``fn(params, *args) -> (scalar, aux)``; it must not close over a traced tensor.
        params: tree of floating tensors.
        *args: further trees of tensors.
        known: what an earlier call with the same arguments returned. Then nothing is evaluated
            here; derivatives are those of the function all the same.

    Returns:
        ``(grads, (loss, aux))``.
    """
    if known is None and _guard.probing():
        return _autodiff.grad_and_value(fn, params, *args)
    inputs, rebuild = trees.tensors((params, args))
    leaves, params_spec = trees.flatten(params)
    n = len(leaves)
    rebuild_aux: list[Any] = []  # known after the first run

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        p, a = rebuild(values)
        loss, aux = fn(p, *a)
        _autodiff.check_scalar(loss)
        found, rebuilder = trees.tensors(aux)
        rebuild_aux[:] = [rebuilder]
        return (loss, *found)

    if known is not None:
        values, rebuild_known = trees.tensors(known)
        found: tuple[Any, tuple[Tensor, Any]] = rebuild_known(
            _MixedGrad.apply(flat, n, len(values), *values, *inputs)
        )
        return found
    out = _MixedGrad.apply(flat, n, 0, *inputs)
    return trees.unflatten(params_spec, out[:n]), (out[n], rebuild_aux[0](out[n + 1 :]))


class _MixedGrad(torch.autograd.Function):
    """``apply(fn, n, k, *k known values, *tensors) -> (*grads of the first n, loss, *aux)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(fn: Any, n: int, k: int, *args: Tensor) -> tuple[Tensor, ...]:
        if k:
            return tuple(x.view_as(x) for x in args[:k])
        return _grads_loss_aux(fn, n, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fn, ctx.n, ctx.k, *args = inputs
        args = args[ctx.k :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args)
        ctx.save_for_forward(*args)
        ctx.differentiable = [_autodiff.is_differentiable(x) for x in output]
        ctx.mark_non_differentiable(*[x for x in output if not _autodiff.is_differentiable(x)])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        def pull(*which: Any) -> Any:
            return functools.partial(_pull, ctx.fn, ctx.n, *which)

        needed = ctx.needs_input_grad[3 + ctx.k :]
        grads = pulled_back(ctx.saved_tensors, needed, cotangents, pull)
        return (None, None, None, *[None] * ctx.k, *grads)

    @staticmethod
    def jvp(
        ctx: Any, _fn: None, _n: None, _k: None, *tangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        args, tangents = ctx.saved_tensors, tangents[ctx.k :]
        wrt = tuple(i for i, t in enumerate(tangents) if t is not None)
        push = functools.partial(_push, ctx.fn, ctx.n, wrt, len(args))
        out = _Remat.apply(push, *args, *[t for t in tangents if t is not None])
        return tuple(x if d else None for x, d in zip(out, ctx.differentiable, strict=True))


def _grads_loss_aux(fn: Any, n: int, *args: Tensor) -> tuple[Tensor, ...]:
    def loss_and_aux(*params: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, *aux = fn(*params, *args[n:])
        return loss, (loss, *aux)

    value, pull, (loss, *aux) = _vjp(loss_and_aux, *args[:n], has_aux=True)
    grads = _once(pull, value, torch.is_grad_enabled())
    seen = {id(x) for x in args}
    return (*grads, loss, *[x.view_as(x) if id(x) in seen else x for x in aux])


def _pull(
    fn: Any, n: int, wrt: tuple[int, ...], given: tuple[int, ...], count: int, *flat: Tensor
) -> tuple[Tensor, ...]:
    """The vjp of `_grads_loss_aux`: ``H v + c grad L`` by one jvp, and the vjp of aux."""
    args = flat[:count]
    cotangents = dict(zip(given, flat[count:], strict=True))
    totals: list[Tensor | None] = [None] * len(wrt)

    if any(i < n for i in cotangents):
        v = tuple(cotangents[i] if i in cotangents else torch.zeros_like(args[i]) for i in range(n))
        first, tangents = _jvp_of_gradient(fn, n, wrt, args, v)
        totals = list(tangents)
    elif n in cotangents:
        first = _gradient(fn, wrt, args, torch.is_grad_enabled())
    if n in cotangents:
        totals = [_plus(t, cotangents[n] * g) for t, g in zip(totals, first, strict=True)]
    aux = [i for i in given if i > n]
    if aux:
        pulled = _autodiff.vjp(
            lambda *inputs: tuple(fn(*_filled(args, wrt, inputs))[i - n] for i in aux),
            [args[i] for i in wrt],
            [cotangents[i] for i in aux],
        )
        totals = [_plus(t, g) for t, g in zip(totals, pulled, strict=True)]
    return tuple(t for t in totals if t is not None)


def _gradient(
    fn: Any, wrt: tuple[int, ...], args: tuple[Tensor, ...], recording: bool
) -> tuple[Tensor, ...]:
    loss, pull = _vjp(lambda *inputs: fn(*_filled(args, wrt, inputs))[0], *[args[i] for i in wrt])
    return _once(pull, loss, recording)


def _once(pull: Any, loss: Tensor, recording: bool) -> tuple[Tensor, ...]:
    """The gradient of a loss by a `torch.func.vjp` that is not called again.

    `torch.func.grad` would keep what the forward pass saved until its end, and a graph of its own
    backward pass (pytorch issue 134612): about twice the memory.
    """
    found: tuple[Tensor, ...] = pull(
        torch.ones_like(loss), retain_graph=recording, create_graph=recording
    )
    return found


def _jvp_of_gradient(
    fn: Any, n: int, wrt: tuple[int, ...], args: tuple[Tensor, ...], v: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradient with respect to ``wrt``, and its derivative along v (in the first n arguments)."""
    recording = torch.is_grad_enabled()
    floats = [i for i, x in enumerate(args) if _autodiff.is_differentiable(x)]
    # Some of torch's formulas (of mse_loss) fail where a tangent is missing: there the other
    # arguments get tangents of zeros, which costs more.
    for moved in (list(range(n)), floats):

        def at(*values: Tensor, moved: list[int] = moved) -> tuple[Tensor, ...]:
            return _gradient(fn, wrt, tuple(_filled(args, tuple(moved), values)), recording)

        tangents = tuple(v[i] if i < n else torch.zeros_like(args[i]) for i in moved)
        try:
            out = torch.func.jvp(at, tuple(_own(args[i]) for i in moved), tangents)
            return out[0], out[1]
        except NotImplementedError as error:
            raise _unsupported(error) from error
        except RuntimeError as error:
            if "forward AD" in str(error):
                raise _unsupported(error) from error
            if "ZeroTensor" not in str(error) or moved is floats:
                raise
    raise AssertionError("unreachable")


def _own(x: Tensor) -> Tensor:
    """``x`` in memory of its own, or no tangent can be laid beside it.

    Under `vmap` the members' parameters may be one and the same, expanded, which does not show.
    """
    shared = torch._C._functorch.peek_interpreter_stack() is not None
    return x.clone() if shared else x.contiguous()


def _unsupported(error: Exception) -> ValueError:
    return ValueError(
        "mixed_mode needs forward-mode derivatives of the gradient, which torch lacks for an "
        f"operation of the loss ({str(error).splitlines()[0]}): write that operation out, or "
        "use mixed_mode=False"
    )


def _push(fn: Any, n: int, wrt: tuple[int, ...], count: int, *flat: Tensor) -> tuple[Tensor, ...]:
    args, tangents = flat[:count], flat[count:]
    return torch.func.jvp(
        lambda *inputs: _grads_loss_aux(fn, n, *_filled(args, wrt, inputs)),
        tuple(args[i] for i in wrt),
        tangents,
    )[1]


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term
