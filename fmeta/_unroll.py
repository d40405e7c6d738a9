"""Inner training: the scan of its step over batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fmeta import _guard, trees
from fmeta._autodiff import check_scalar
from fmeta._inner_step import (
    Extras,
    InnerState,
    absent,
    check_extras,
    check_modes,
    guard_loss,
    order_of,
    pair,
    step_of,
)
from fmeta._scan import CURE, checked_args, loop_length, scan
from fmeta._scan_keeping import scan_keeping
from fmeta.optimizer import (
    Optimizer,
    check_needs,
    check_num_steps,
    check_optimizer_type,
    check_params,
)

__all__ = ["Run", "unroll"]

Tree = Any


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
            less memory a step, more time on small models. ``"keep_gradients"``:
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
    check_extras(extras)
    if mixed_mode and order_of(first_order) is not None:
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
    step = step_of(optimizer, loss_fn, order_of(first_order), mixed_mode, recompute)
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
        if absent(state.model_state):
            value = evaluate(shown, x["eval_batches"], *args)
        else:
            value = pair(evaluate(shown, x["eval_batches"], state.model_state, *args))[0]
        check_scalar(value, "eval_loss_fn")
        return state, (loss, value), found

    def body(state: InnerState, x: Any, opt_params: Tree, args: Any) -> tuple[InnerState, Any]:
        return keeping_body(state, x, opt_params, args)[:2]

    if (mixed_mode or recompute) and checkpoint is None:  # a checkpointed scan looks by itself
        first = trees.map(lambda x: x[0] if isinstance(x, Tensor) else x, xs)
        if recompute is None:
            guard_loss(loss_fn, model_params, first["batches"], start.model_state, args)
        else:
            _guard.refuse_closures_and_noise(body, start, first, opt_params, args, cure=CURE)
    loop: Any = functools.partial(scan, body)
    if mixed_mode == "keep_gradients" and checkpoint is not None and optimizer.reads_grads:
        loop = functools.partial(scan_keeping, keeping_body)
    state, ys = loop(start, xs, consts=(opt_params, args), checkpoint=checkpoint)
    evals = ys[1] if len(ys) > 1 else ()
    return Run(ys[0], state.params, state.hidden, state.model_state, evals)
