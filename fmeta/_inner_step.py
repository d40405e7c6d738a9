"""One step of inner training as a pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import _guard, trees
from fmeta._autodiff import check_scalar, grad_and_value
from fmeta._mixed import mixed_grad_and_value
from fmeta._remat import remat
from fmeta._scan import CURE, checked_args
from fmeta.optimizer import Optimizer, apply_updates, check_optimizer_type

__all__ = ["InnerState", "inner_step"]

Tree = Any
Extras = Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None


class InnerState(NamedTuple):
    """What inner training carries from step to step.

    Attributes:
        params: the model's parameters.
        hidden: the optimizer's state.
        model_state: the model's own state (running statistics, an RNN state); ``()`` for none.
    """

    params: Any
    hidden: Any
    model_state: Any = ()


def inner_step(
    optimizer: Optimizer,
    loss_fn: Callable[..., Any],
    *,
    loss_args: Sequence[Tree] = (),
    first_order: bool | str = False,
    mixed_mode: bool | str = False,
    recompute: str | None = None,
) -> Callable[..., tuple[InnerState, dict[str, Tensor]]]:
    """One step of inner training as a pure function.

    Args:
        optimizer: any `Optimizer`.
        loss_fn: ``(params, batch, *loss_args) -> scalar``, or with a model state
            ``(params, batch, model_state, *loss_args) -> (scalar, model_state)``.
        loss_args: default of the step's argument of that name.
        first_order, mixed_mode, recompute: as in `unroll`.

    Returns:
        ``step(opt_params, state, batch, *, loss_args=(), extras=None) -> (state, metrics)`` with an
        `InnerState` and ``metrics = {"loss": loss before the update}``; ``extras`` as in `unroll`,
        of this step.

    Raises:
        ValueError: for an unknown ``first_order``; later, for a loss that is not a scalar, or trees
            that do not match (with the path).
    """
    check_optimizer_type(optimizer, "optimizer")
    check_modes(recompute, mixed_mode)
    run = step_of(optimizer, loss_fn, order_of(first_order), mixed_mode, recompute)
    default_args = checked_args(loss_args, "loss_args")

    def step(
        opt_params: Tree,
        state: InnerState,
        batch: Tree,
        *,
        loss_args: Sequence[Tree] | None = None,
        extras: Extras = None,
    ) -> tuple[InnerState, dict[str, Tensor]]:
        args = default_args if loss_args is None else checked_args(loss_args, "loss_args")
        if mixed_mode:
            guard_loss(loss_fn, state.params, batch, state.model_state, args)
        check_extras(extras)
        if recompute is not None:
            _guard.refuse_closures_and_noise(run, opt_params, state, batch, args, extras, cure=CURE)
        state, loss, _ = run(opt_params, state, batch, args, extras)
        return state, {"loss": loss}

    return step


def step_of(
    optimizer: Optimizer,
    loss_fn: Callable[..., Any],
    order: str | None,
    mixed_mode: bool | str,
    recompute: str | None,
) -> Callable[..., tuple[InnerState, Tensor, Any]]:
    """``step(opt_params, state, batch, args, extras) -> (state, loss, found)``.

    ``found`` is what the gradient gave; in mixed mode a further argument that is this saves its
    evaluation.
    """
    gradient: Callable[..., Any] = mixed_grad_and_value if mixed_mode else grad_and_value
    if not optimizer.reads_grads:
        gradient = _no_gradient
    update: Callable[..., Any] = optimizer.update
    if recompute in ("gradient", "both"):
        gradient = _recomputed_gradient(gradient)
    if recompute in ("rule", "both"):
        update = _recomputed_update(optimizer)

    def step(
        opt_params: Tree, state: InnerState, batch: Tree, args: Any, extras: Any, known: Any = None
    ) -> tuple[InnerState, Tensor, Any]:
        params, hidden, model_state = state
        stateless = absent(model_state)
        given = {} if known is None else {"known": known}
        if stateless:
            found = gradient(
                lambda p, b, a: (loss_fn(p, b, *a), model_state), params, batch, args, **given
            )
        else:
            found = gradient(
                lambda p, b, s, a: pair(loss_fn(p, b, s, *a)),
                params,
                batch,
                model_state,
                args,
                **given,
            )
        grads, (loss, new_state) = found
        read_params, read_loss = params, loss
        if order is not None:
            grads = _detached(grads)
        if order == "inputs":
            read_params, read_loss = _detached(params), loss.detach()
        if callable(extras):
            states = () if stateless else (model_state,)
            extras = extras(read_params, batch, *states, *args)
            _check_found(extras, optimizer.needs)
            if order == "inputs":
                extras = _detached(extras)
        delta, hidden = update(
            opt_params, read_params, grads, hidden, loss=read_loss, extras=extras
        )
        return InnerState(apply_updates(params, delta), hidden, new_state), loss, found

    return step


def _recomputed_gradient(gradient: Callable[..., Any]) -> Callable[..., Any]:
    def again(fn: Callable[..., Any], *args: Tree) -> Any:
        if _guard.probing():
            return gradient(fn, *args)
        return remat(lambda *args: gradient(fn, *args))(*args)

    return again


def _recomputed_update(optimizer: Optimizer) -> Callable[..., Any]:
    def update(*args: Tree, loss: Tensor, extras: Mapping[str, Any] | None) -> Any:
        if _guard.probing():
            return optimizer.update(*args, loss=loss, extras=extras)
        # What the rule does not need is not handed in: each argument costs a gradient.
        loss_and_extras = (loss, extras and dict(extras)) if optimizer.needs else (None, None)

        def fn(args: Tree, loss: Any, extras: Any) -> Any:
            return optimizer.update(*args, loss=loss, extras=extras)

        return remat(fn)(args, *loss_and_extras)

    return update


def check_modes(recompute: Any, mixed_mode: Any) -> None:
    """Raises a ValueError for options of `unroll` that are unknown or do not go together."""
    if not isinstance(mixed_mode, bool) and mixed_mode != "keep_gradients":
        raise ValueError(f'mixed_mode must be False, True or "keep_gradients", got {mixed_mode!r}')
    if recompute not in (None, "gradient", "rule", "both"):
        raise ValueError(f'recompute must be None, "gradient", "rule" or "both", got {recompute!r}')
    if mixed_mode and recompute in ("gradient", "both"):
        raise ValueError(
            f"mixed_mode={mixed_mode!r} cannot be combined with recompute={recompute!r}: mixed "
            'mode computes the gradient again by itself; give recompute="rule" or None'
        )


def guard_loss(
    loss_fn: Callable[..., Any], params: Tree, batch: Tree, model_state: Tree, args: Any
) -> None:
    """Mixed mode computes the loss again in the backward pass: it may not close over a tracer."""
    state_args = () if absent(model_state) else (model_state,)
    _guard.refuse_closures_and_noise(loss_fn, params, batch, *state_args, *args, cure=CURE)


def absent(model_state: Any) -> bool:
    return model_state is None or (isinstance(model_state, tuple) and model_state == ())


def pair(result: Any) -> tuple[Tensor, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(
            "with model_state, loss_fn must return (loss, model_state), got "
            f"a {type(result).__name__}"
        )
    return result


def _no_gradient(
    fn: Callable[..., tuple[Tensor, Any]], params: Tree, *args: Any
) -> tuple[Tree, tuple[Tensor, Any]]:
    """As `grad_and_value`, with zeros in the place of gradients that the rule does not read."""
    loss, aux = fn(params, *args)
    check_scalar(loss)
    return trees.map(torch.zeros_like, params), (loss, aux)


def check_extras(extras: Any) -> None:
    """Raises a TypeError unless these are a dict, a function that is to give one, or None."""
    if extras is None or isinstance(extras, Mapping) or callable(extras):
        return
    raise TypeError(
        "extras must be a dict by the names of what the rule needs, got "
        f"a {type(extras).__name__}; or a function (params, batch, *loss_args) that gives one"
    )


def _check_found(extras: Any, needs: frozenset[str]) -> None:
    if not isinstance(extras, Mapping):
        raise TypeError(
            "the function of extras must give a dict by the names of what the rule needs, got "
            f"a {type(extras).__name__}"
        )
    missing = sorted(needs - {"loss", "num_steps"} - set(extras))
    if missing:
        raise ValueError(
            f"this optimizer needs {', '.join(missing)}, but the function of extras gives "
            f"{', '.join(map(str, extras)) or 'nothing'}: let it return {{{missing[0]!r}: ...}} too"
        )


def _detached(tree: Tree) -> Tree:
    return trees.map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def order_of(first_order: bool | str) -> str | None:
    known = {False: None, True: "gradients", "gradients": "gradients", "inputs": "inputs"}
    if not isinstance(first_order, (bool, str)) or first_order not in known:
        raise ValueError(
            f'first_order must be False, True, "gradients" or "inputs", got {first_order!r}'
        )
    return known[first_order]
