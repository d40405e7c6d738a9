"""The exact meta-gradient: backpropagation through the whole of inner training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fmeta._autodiff import check_scalar, grad_and_value
from fmeta._inner_step import check_modes
from fmeta._unroll import Run, unroll
from fmeta.distributed import Ranks
from fmeta.estimators._arguments import check_arguments
from fmeta.estimators._contract import (
    Bind,
    Estimator,
    InnerLoss,
    bind_opt_params,
    bound_start,
    learned_loss,
)
from fmeta.estimators._fresh_tasks import OfOneTask, over_fresh_tasks
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily, extras_of_task, loss_of_task

__all__ = ["full", "over_whole_trainings"]


def full(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int,
    bind: Bind | None = None,
    inner_loss: InnerLoss | None = None,
    meta_loss: Callable[[Run], Tensor] | None = None,
    eval_split: str | None = None,
    first_order: bool | str = False,
    checkpoint: str | int | None = None,
    mixed_mode: bool | str = False,
    recompute: str | None = None,
    chunk_size: int | None = None,
    ranks: Ranks | None = None,
) -> Estimator:
    """Meta-gradient through the whole unroll, averaged over freshly drawn tasks by `vmap`.

    Args:
        optimizer: the rule being learned, or the one under which something else is.
        family: where the tasks come from; of a `fmeta.tasks.mixture` each family gets its share
            of the tasks.
        num_tasks: tasks an estimate averages over.
        horizon: inner steps T.
        bind: ``bind(meta_params, config) -> (opt_params, model_params or None)``; says what is
            learned. Default: ``meta_params`` are the optimizer's parameters; ``None`` means that
            models start by ``family.init``.
        inner_loss: ``inner_loss(data, config, model_params, batch, meta_params) -> scalar``, what
            training minimises where that is learned too (a penalty, weights of examples, a loss
            that is a network); evaluations stay with the family's loss. Default: the family's.
        meta_loss: ``meta_loss(run) -> scalar`` of one task's `Run`; default the mean of its
            ``eval_losses`` with ``eval_split``, else of its ``losses``.
        eval_split: the split of the family's data from which one batch is evaluated after each
            inner step (``"validation"``: learn to generalise, not only to fit); None: none.
            ``"train"`` evaluates each batch after the step on it.
        first_order, checkpoint, mixed_mode, recompute: as in `fmeta.unroll`.
        chunk_size: tasks that are worked on together, as in `torch.vmap`; None: all. Values are
            the same up to rounding; less memory, and convolutions are often faster by 8.
        ranks: who share the tasks (`fmeta.distributed.joined`); default this process alone.

    Returns:
        An `Estimator`. Task i of estimate k is a function of ``(seed, k, i)``. Metrics are those
        of `Estimate`, with ``"losses"`` ``(num_tasks, T)``. Tasks are drawn on the CPU and moved
        to the device of ``family.data`` (without data: of ``meta_params``).

    Raises:
        ValueError: ``num_tasks``, ``horizon`` or ``chunk_size`` below 1; an optimizer that needs
            what the family's ``extras`` do not give; fewer tasks than families; an ``inner_loss``
            that nothing else judges; a ``mixed_mode`` or ``recompute`` that is unknown, or both of
            the gradient; later, a ``meta_loss`` that is no scalar, a start of another
            shape than the family's.
        TypeError: no optimizer, no family, no function (or one of other arguments); later, a
            meta-parameter that is no floating tensor, a seed that is no integer, a state of another
            estimator.
    """
    check_modes(recompute, mixed_mode)
    return over_whole_trainings(
        grad_and_value,
        optimizer,
        family,
        num_tasks=num_tasks,
        horizon=horizon,
        bind=bind,
        inner_loss=inner_loss,
        meta_loss=meta_loss,
        eval_split=eval_split,
        chunk_size=chunk_size,
        ranks=ranks,
        first_order=first_order,
        checkpoint=checkpoint,
        mixed_mode=mixed_mode,
        recompute=recompute,
    )


def over_whole_trainings(
    differentiate: Callable[..., tuple[Any, tuple[Tensor, Any]]],
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int,
    bind: Bind | None,
    inner_loss: InnerLoss | None,
    meta_loss: Callable[[Run], Tensor] | None,
    eval_split: str | None,
    chunk_size: int | None,
    ranks: Ranks | None = None,
    **options: Any,
) -> Estimator:
    """Mean over tasks of the gradient of a task's meta-loss, as ``differentiate`` takes it.

    Args:
        differentiate: ``differentiate(one, meta_params, *args) -> (grads, (value, aux))`` for
            ``one(meta_params, *args) -> (scalar, aux)``, such as `grad_and_value`; used under
            `vmap` over tasks.
        optimizer, family, num_tasks, horizon, bind, inner_loss, meta_loss, eval_split, chunk_size,
            ranks: of `full`.
        **options: of `fmeta.unroll`.
    """
    check_arguments(
        optimizer,
        num_tasks=num_tasks,
        horizon=horizon,
        bind=bind,
        inner_loss=inner_loss,
        meta_loss_of_run=meta_loss,
        eval_split=eval_split,
        chunk_size=chunk_size,
        ranks=ranks,
    )
    if inner_loss is not None and eval_split is None and meta_loss is None:
        raise ValueError(
            "an inner_loss that is learned cannot be judged by itself: give eval_split (the "
            "family's loss then counts), or a meta_loss of the run"
        )
    bind, score = bind or bind_opt_params, meta_loss or _mean_loss

    def gradient_of(family: TaskFamily) -> Callable[..., OfOneTask]:
        loss_fn = loss_of_task(family)
        trained = loss_fn if inner_loss is None else learned_loss(inner_loss, family)
        extras = extras_of_task(family, optimizer)
        judge = {"eval_loss_fn": lambda p, b, config, *_: loss_fn(p, b, config)}

        def one(
            meta_params: Any, config: Any, params: Any, batches: Any, eval_batches: Any
        ) -> tuple[Tensor, Any]:
            opt_params, start = bound_start(bind, meta_params, config, params)
            run = unroll(
                optimizer,
                trained,
                opt_params,
                start,
                batches,
                loss_args=(config,) if inner_loss is None else (config, meta_params),
                extras=None if extras is None else lambda p, b, config, *_: extras(p, b, config),
                **({} if eval_split is None else {"eval_batches": eval_batches, **judge}),
                **options,
            )
            own = {"config": config} if "config" in getattr(score, "needs", ()) else {}
            value = score(run, **own)
            check_scalar(value, "meta_loss")
            return value, (run.losses, run.eval_losses)

        def gradient(meta_params: Any, *args: Any) -> OfOneTask:
            grads, (value, (losses, evals)) = differentiate(one, meta_params, *args)
            return OfOneTask(grads, value, losses, evals, {})

        return gradient

    return over_fresh_tasks(
        gradient_of,
        family,
        num_tasks=num_tasks,
        horizon=horizon,
        eval_split=eval_split,
        chunk_size=chunk_size,
        ranks=ranks,
    )


def _mean_loss(run: Run) -> Tensor:
    losses: Tensor = run.eval_losses if isinstance(run.eval_losses, Tensor) else run.losses
    return losses.mean()
