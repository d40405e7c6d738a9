"""Inner training: one step of it, and its scan over batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import _guard, trees
from fmeta._autodiff import check_scalar, grad_and_value
from fmeta._mixed import mixed_grad_and_value
from fmeta._remat import remat
from fmeta._scan import CURE, checked_args, loop_length, scan
from fmeta._scan_keeping import scan_keeping
from fmeta.optimizer import (
    Optimizer,
    apply_updates,
    check_needs,
    check_num_steps,
    check_optimizer_type,
    check_params,
)

__all__ = ["InnerState", "Run", "inner_step", "unroll"]

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


class Run(NamedTuple):
    """The result of `unroll`.

    Attributes:
        losses: shape ``(T,)``, the training loss before each update.
        params: the parameters after T updates.
        hidden: the optimizer's state after T updates.
        model_state: the model's state after T updates; ``()`` when there is none, so that a whole
            Run can leave ``vmap`` (which takes tensors only).
        eval_losses: shape ``(T,)``, the evaluation loss after each update; or ``()``.
    """

    losses: Tensor
    params: Any
    hidden: Any
    model_state: Any = ()
    eval_losses: Any = ()


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
    run = _step(optimizer, loss_fn, _order(first_order), mixed_mode, recompute)
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
            _guard_loss(loss_fn, state.params, batch, state.model_state, args)
        _check_extras(extras)
        if recompute is not None:
            _guard.refuse_closures_and_noise(run, opt_params, state, batch, args, extras, cure=CURE)
        state, loss, _ = run(opt_params, state, batch, args, extras)
        return state, {"loss": loss}

    return step


def _step(
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
        stateless = _absent(model_state)
        given = {} if known is None else {"known": known}
        if stateless:
            found = gradient(
                lambda p, b, a: (loss_fn(p, b, *a), model_state), params, batch, args, **given
            )
        else:
            found = gradient(
                lambda p, b, s, a: _pair(loss_fn(p, b, s, *a)),
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


def unroll(
    optimizer: Optimizer,
    loss_fn: Callable[..., Any],
    opt_params: Tree,
    model_params: Tree,
    batches: Tree,
    *,
    loss_args: Sequence[Tree] = (),
    hidden: Tree = None,
    num_steps: int | Tensor | None = None,
    model_state: Tree = None,
    extras: Extras = None,
    first_order: bool | str = False,
    checkpoint: str | int | None = None,
    mixed_mode: bool | str = False,
    recompute: str | None = None,
    eval_batches: Tree = None,
    eval_loss_fn: Callable[..., Any] | None = None,
) -> Run:
    """Trains a model for T steps, as a pure function of everything that goes in.

    Its gradient with respect to ``opt_params`` is what learns an optimizer, with respect to
    ``model_params`` what learns an initialisation, with respect to both what learns both.

    Args:
        optimizer: any `Optimizer`.
        loss_fn: ``(params, batch, *loss_args) -> scalar``, or with ``model_state``
            ``(params, batch, model_state, *loss_args) -> (scalar, model_state)``. The inner
            gradient is with respect to ``params`` only.
        opt_params: what the optimizer learns.
        model_params: initial parameters, tree of floating tensors.
        batches: tree of tensors with leading dimension T; step t sees slice t.
        loss_args: trees that the loss reads beside the batch: whatever is being differentiated or
            batched from outside must stand here under ``checkpoint``, ``mixed_mode`` or
            ``recompute``.
        hidden: the optimizer's state to go on from; by default ``optimizer.init_hidden``.
        num_steps: horizon for ``init_hidden``, int or scalar tensor; default T.
        model_state: the model's state to start from, any tree of tensors.
        extras: further inputs of the rule by name: a dict of trees with leading dimension T; or,
            for what depends on the parameters (activations), a function that gives a step's dict:
            ``extras(params, batch, *loss_args)``, or with ``model_state`` ``extras(params, batch,
            model_state, *loss_args)``. It is called before the update, at the parameters, state and
            batch that the loss is taken at.
        first_order: ``False``: exact. ``"gradients"`` (or True): the gradients that enter the rule
            are constants (first-order MAML; 1606.04474); what a function of ``extras`` gives is
            not, for it is no gradient. ``"inputs"``: gradients, parameters, loss and what such a
            function gives are constants where the rule reads them. The path through ``params +
            delta`` and through ``hidden`` is never cut, and values are equal in all three.
        checkpoint: ``None``, ``"sqrt"`` or a number of snapshots, see `fmeta.scan`.
        mixed_mode: True: Hessian-vector products forward over reverse (2505.00793): same values,
            less memory a step, more time on small models. ``"keep_gradients"`` (as there):
            under ``checkpoint`` the gradients of all T steps are kept, so that steps that are run
            again do not evaluate the model: faster, for T times the size of the parameters;
            without ``checkpoint`` the same as True. With ``first_order`` there is no such product
            to take, so the two together are refused.
        recompute: what of a step is computed again in the backward pass, so that its graph is not
            kept: ``None``, ``"gradient"`` (the model's: loss and inner backward pass), ``"rule"``
            (the optimizer's update) or ``"both"``. Under ``checkpoint`` it bounds what is held
            while a step is differentiated: the larger of the two graphs, not their sum. Mixed mode
            recomputes the gradient anyway. For a rule in chunks of coordinates see `chunked`.
        eval_batches: tree with leading dimension T; after update t, slice t is evaluated.
        eval_loss_fn: like ``loss_fn`` (its model state is discarded); default ``loss_fn``.

    Returns:
        A `Run`.

    Raises:
        ValueError: T = 0 or leading dimensions that differ, trees that do not match, something
            that the rule needs and did not get, unknown options, closed-over traced tensors under
            ``checkpoint``, ``mixed_mode`` or
            ``recompute``.
        TypeError: a parameter that is not a floating tensor (with its path), a builder in place of
            an optimizer, ``loss_args`` that are no tuple, ``extras`` that are neither a dict nor
            a function that gives one.

    Example:
        >>> import torch, fmeta
        >>> loss = lambda p, target: (p["w"] - target).square().sum()
        >>> def meta_loss(log_lr):
        ...     rule = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.1)
        ...     run = fmeta.unroll(rule, loss, log_lr, {"w": torch.ones(1)}, torch.zeros(3))
        ...     return run.losses.sum()
        >>> torch.func.grad(meta_loss)({"lr": torch.tensor(-2.0)})["lr"] < 0
        tensor(True)
    """
    check_optimizer_type(optimizer, "optimizer")
    check_params(model_params, allow_none=False)
    _check_extras(extras)
    if mixed_mode and _order(first_order) is not None:
        raise ValueError(
            f"mixed_mode={mixed_mode!r} cannot be combined with first_order={first_order!r}: "
            "first order takes no second derivative that mixed mode could make cheaper; drop one "
            "of the two"
        )
    check_modes(recompute, mixed_mode)
    if eval_loss_fn is not None and eval_batches is None:
        raise ValueError("eval_loss_fn is given without eval_batches: give both")
    computed = extras if callable(extras) else None
    given = None if callable(extras) else extras
    xs = {"batches": batches, "extras": given, "eval_batches": eval_batches}
    if not any(isinstance(x, Tensor) for x in trees.leaves(batches)):
        raise ValueError("batches holds no tensor: for data-free losses give torch.zeros(T)")
    total = loop_length(xs)
    if computed is None:
        check_needs(optimizer.needs - {"loss"}, None, given)
    check_num_steps(frozenset(), num_steps)
    if hidden is None:
        hidden = optimizer.init_hidden(
            opt_params, model_params, num_steps=total if num_steps is None else num_steps
        )
    start = InnerState(model_params, hidden, () if model_state is None else model_state)
    step = _step(optimizer, loss_fn, _order(first_order), mixed_mode, recompute)
    evaluate = loss_fn if eval_loss_fn is None else eval_loss_fn
    args = checked_args(loss_args, "loss_args")

    def keeping_body(
        state: InnerState, x: Any, opt_params: Tree, args: Any, known: Any = None
    ) -> tuple[InnerState, Any, Any]:
        state, loss, found = step(
            opt_params, state, x["batches"], args, computed or x["extras"], known
        )
        if eval_batches is None:
            return state, (loss,), found
        shown = optimizer.eval_params(opt_params, state.params, state.hidden)
        if _absent(state.model_state):
            value = evaluate(shown, x["eval_batches"], *args)
        else:
            value = _pair(evaluate(shown, x["eval_batches"], state.model_state, *args))[0]
        check_scalar(value, "eval_loss_fn")
        return state, (loss, value), found

    def body(state: InnerState, x: Any, opt_params: Tree, args: Any) -> tuple[InnerState, Any]:
        return keeping_body(state, x, opt_params, args)[:2]

    if (mixed_mode or recompute) and checkpoint is None:  # a checkpointed scan looks by itself
        first = trees.map(lambda x: x[0] if isinstance(x, Tensor) else x, xs)
        if recompute is None:
            _guard_loss(loss_fn, model_params, first["batches"], start.model_state, args)
        else:
            _guard.refuse_closures_and_noise(body, start, first, opt_params, args, cure=CURE)
    loop: Any = functools.partial(scan, body)
    if mixed_mode == "keep_gradients" and checkpoint is not None and optimizer.reads_grads:
        loop = functools.partial(scan_keeping, keeping_body)
    state, ys = loop(start, xs, consts=(opt_params, args), checkpoint=checkpoint)
    evals = ys[1] if len(ys) > 1 else ()
    return Run(ys[0], state.params, state.hidden, state.model_state, evals)


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


def _guard_loss(
    loss_fn: Callable[..., Any], params: Tree, batch: Tree, model_state: Tree, args: Any
) -> None:
    """Mixed mode computes the loss again in the backward pass: it may not close over a tracer."""
    state_args = () if _absent(model_state) else (model_state,)
    _guard.refuse_closures_and_noise(loss_fn, params, batch, *state_args, *args, cure=CURE)


def _absent(model_state: Any) -> bool:
    return model_state is None or (isinstance(model_state, tuple) and model_state == ())


def _pair(result: Any) -> tuple[Tensor, Any]:
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


def _check_extras(extras: Any) -> None:
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


def _order(first_order: bool | str) -> str | None:
    known = {False: None, True: "gradients", "gradients": "gradients", "inputs": "inputs"}
    if not isinstance(first_order, (bool, str)) or first_order not in known:
        raise ValueError(
            f'first_order must be False, True, "gradients" or "inputs", got {first_order!r}'
        )
    return known[first_order]
