"""The exact meta-gradient: backpropagation through the whole of inner training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta._autodiff import grad_and_value
from fmeta._unroll import Run, unroll
from fmeta.distributed import Ranks, Share
from fmeta.estimators._averages import first_bad_step, mean_over_tasks
from fmeta.estimators._contract import (
    Bind,
    Estimate,
    Estimator,
    bind_opt_params,
    bound_pair,
    check_meta_params,
    check_sizes,
)
from fmeta.estimators._mixture import over_families
from fmeta.optimizer import Optimizer, check_optimizer_type
from fmeta.tasks import (
    Mixture,
    TaskFamily,
    extras_of_task,
    loss_of_task,
    sample_batches,
    sample_task,
    stack_tasks,
)
from fmeta.tasks._family import device_of_tasks

__all__ = ["full", "over_whole_trainings"]


class FullState(NamedTuple):
    """Where the stream of tasks stands.

    Attributes:
        seed: the seed of the run.
        step: the number of estimates made.
    """

    seed: int
    step: int


def full(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int,
    bind: Bind | None = None,
    meta_loss: Callable[[Run], Tensor] | None = None,
    eval_split: str | None = None,
    first_order: bool | str = False,
    checkpoint: str | int | None = None,
    mixed_mode: bool = False,
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
        meta_loss: ``meta_loss(run) -> scalar`` of one task's `Run`; default the mean of its
            ``eval_losses`` with ``eval_split``, else of its ``losses``.
        eval_split: the split of the family's data from which one batch is evaluated after each
            inner step (``"validation"``: learn to generalise, not only to fit); None: none.
            ``"train"`` evaluates each batch after the step on it.
        first_order, checkpoint, mixed_mode: as in `fmeta.unroll`.
        chunk_size: tasks that are worked on together, as in `torch.vmap`; None: all. Values are
            the same up to rounding; less memory, and convolutions are often faster by 8.
        ranks: who share the tasks (`fmeta.distributed.joined`); default this process alone.

    Returns:
        An `Estimator`. Task i of estimate k is a function of ``(seed, k, i)``. Metrics are those
        of `Estimate`, with ``"losses"`` ``(num_tasks, T)``. Tasks are drawn on the CPU and moved
        to the device of ``family.data`` (without data: of ``meta_params``).

    Raises:
        ValueError: ``num_tasks``, ``horizon`` or ``chunk_size`` below 1; an optimizer that needs
            what the family's ``extras`` do not give; fewer tasks than families.
        TypeError: no optimizer, no family; later, a meta-parameter that is no floating tensor.
    """
    return over_whole_trainings(
        grad_and_value,
        optimizer,
        family,
        num_tasks=num_tasks,
        horizon=horizon,
        bind=bind,
        meta_loss=meta_loss,
        eval_split=eval_split,
        chunk_size=chunk_size,
        ranks=ranks,
        first_order=first_order,
        checkpoint=checkpoint,
        mixed_mode=mixed_mode,
    )


def over_whole_trainings(
    differentiate: Callable[..., tuple[Any, tuple[Tensor, Any]]],
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int,
    bind: Bind | None,
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
        optimizer, family, num_tasks, horizon, bind, meta_loss, eval_split, chunk_size, ranks: of
            `full`.
        **options: of `fmeta.unroll`.
    """
    check_optimizer_type(optimizer, "optimizer")
    check_sizes(num_tasks=num_tasks, horizon=horizon, chunk_size=chunk_size)
    bind, score = bind or bind_opt_params, meta_loss or _mean_loss

    def build(family: TaskFamily, share: Share) -> Estimator:
        loss_fn = loss_of_task(family)
        extras = extras_of_task(family, optimizer)

        def one(
            meta_params: Any, config: Any, params: Any, batches: Any, eval_batches: Any
        ) -> tuple[Tensor, Any]:
            opt_params, start = bound_pair(bind, meta_params, config)
            run = unroll(
                optimizer,
                loss_fn,
                opt_params,
                params if start is None else start,
                batches,
                loss_args=(config,),
                extras=extras,
                eval_batches=None if eval_split is None else eval_batches,
                **options,
            )
            own = {"config": config} if "config" in getattr(score, "needs", ()) else {}
            return score(run, **own), (run.losses, run.eval_losses)

        of_tasks = torch.vmap(
            lambda *args: differentiate(one, *args),
            in_dims=(None, 0, 0, 0, 0),
            chunk_size=chunk_size,
        )

        def init(meta_params: Any, seed: int) -> FullState:
            check_meta_params(meta_params)
            return FullState(int(seed), 0)

        def estimate(meta_params: Any, state: FullState) -> tuple[Estimate, FullState]:
            check_meta_params(meta_params)
            drawn = [(state.seed, state.step, i) for i in share.worked_on]
            device = device_of_tasks(family, meta_params)
            tasks = [sample_task(family, horizon, *ints) for ints in drawn]
            stacked = stack_tasks(tasks, device)
            shown = stacked.batches
            if eval_split is not None:
                seen = [
                    sample_batches(family, task.config, horizon, *ints, split=eval_split)
                    for task, ints in zip(tasks, drawn, strict=True)
                ]
                shown = stack_tasks(seen, device)
            with torch.no_grad():  # nothing outside is being differentiated: plain autograd inside
                parts, (values, (losses, evals)) = of_tasks(meta_params, *stacked, shown)
                bad_step = first_bad_step(_by_step(losses), _by_step(evals))
                metrics = {"losses": losses, "drawn": torch.tensor(drawn, device=device)}
                estimate = mean_over_tasks(values, parts, bad_step, metrics, share=share)
            return estimate, state._replace(step=state.step + 1)

        return Estimator(init, estimate, share.ranks)

    return over_families(build, family, num_tasks, ranks or Ranks.alone())


def _mean_loss(run: Run) -> Tensor:
    losses: Tensor = run.eval_losses if isinstance(run.eval_losses, Tensor) else run.losses
    return losses.mean()


def _by_step(losses: Any) -> Tensor | None:
    """``(tasks, T)`` as ``(T, tasks, 1)``; None for no losses."""
    return losses.T.unsqueeze(-1) if isinstance(losses, Tensor) else None
