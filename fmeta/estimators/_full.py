"""The exact meta-gradient: backpropagation through the whole of inner training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta._autodiff import grad_and_value
from fmeta._unroll import Run, unroll
from fmeta.estimators._contract import Bind, Estimate, Estimator, bind_opt_params
from fmeta.optimizer import Optimizer, check_optimizer_type
from fmeta.tasks import TaskFamily, loss_of_task, sample_batches, sample_task, stack_tasks
from fmeta.tasks._family import device_of_tasks

__all__ = ["full"]


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
    family: TaskFamily,
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
) -> Estimator:
    """Meta-gradient through the whole unroll, averaged over freshly drawn tasks by `vmap`.

    Args:
        optimizer: the rule being learned, or the one under which something else is.
        family: where the tasks come from.
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
            the same up to rounding; convolutions are often faster by 8.

    Returns:
        An `Estimator`. Task i of estimate k is a function of ``(seed, k, i)``. Metrics:
        ``"losses"`` ``(num_tasks, T)``. Tasks are drawn on the CPU and moved to the device of
        ``family.data`` (without data: of ``meta_params``).

    Raises:
        ValueError: ``num_tasks``, ``horizon`` or ``chunk_size`` below 1.
    """
    sizes = {"num_tasks": num_tasks, "horizon": horizon, "chunk_size": chunk_size}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_optimizer_type(optimizer, "optimizer")
    bind = bind or bind_opt_params
    score = meta_loss or _mean_loss
    loss_fn = loss_of_task(family)

    def one(
        meta_params: Any, config: Any, params: Any, batches: Any, eval_batches: Any
    ) -> tuple[Tensor, Tensor]:
        bound = bind(meta_params, config)
        if not isinstance(bound, tuple) or len(bound) != 2:
            raise ValueError(
                f"bind must return (opt_params, model_params or None), got a {type(bound).__name__}"
            )
        opt_params, start = bound
        run = unroll(
            optimizer,
            loss_fn,
            opt_params,
            params if start is None else start,
            batches,
            loss_args=(config,),
            first_order=first_order,
            checkpoint=checkpoint,
            mixed_mode=mixed_mode,
            eval_batches=None if eval_split is None else eval_batches,
        )
        return score(run), run.losses

    def average(meta_params: Any, tasks: Any, shown: Any) -> tuple[Tensor, Tensor]:
        scores, losses = torch.vmap(one, in_dims=(None, 0, 0, 0, 0), chunk_size=chunk_size)(
            meta_params, tasks.config, tasks.model_params, tasks.batches, shown
        )
        return scores.mean(), losses

    def init(meta_params: Any, seed: int) -> FullState:
        return FullState(int(seed), 0)

    def estimate(meta_params: Any, state: FullState) -> tuple[Estimate, FullState]:
        ints = [(state.seed, state.step, i) for i in range(num_tasks)]
        device = device_of_tasks(family, meta_params)
        drawn = [sample_task(family, horizon, *i) for i in ints]
        tasks = stack_tasks(drawn, device)
        shown = tasks.batches
        if eval_split is not None:
            seen = [
                sample_batches(family, task.config, horizon, *i, split=eval_split)
                for task, i in zip(drawn, ints, strict=True)
            ]
            shown = stack_tasks(seen, device)
        with torch.no_grad():  # nothing outside is being differentiated: plain autograd inside
            grads, (loss, losses) = grad_and_value(average, meta_params, tasks, shown)
        return Estimate(loss, grads, {"losses": losses}), state._replace(step=state.step + 1)

    return Estimator(init, estimate)


def _mean_loss(run: Run) -> Tensor:
    losses: Tensor = run.eval_losses if isinstance(run.eval_losses, Tensor) else run.losses
    return losses.mean()
