"""Estimates from whole trainings on freshly drawn tasks, side by side under `vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.distributed import Ranks, Share
from fmeta.estimators._arguments import check_state, checked_seed
from fmeta.estimators._averages import first_bad_step, mean_over_tasks
from fmeta.estimators._contract import Estimate, Estimator, check_meta_params
from fmeta.estimators._mixture import over_families
from fmeta.tasks import Mixture, TaskFamily, sample_batches, sample_task, stack_tasks
from fmeta.tasks._family import device_of_tasks

__all__ = ["FreshTasksState", "OfOneTask", "over_fresh_tasks"]

Tree = Any


class FreshTasksState(NamedTuple):
    """Where the stream of tasks stands.

    Attributes:
        seed: the seed of the run.
        step: the number of estimates made.
    """

    seed: int
    step: int


class OfOneTask(NamedTuple):
    """What the training of a task gives.

    Attributes:
        grads: like the meta-parameters.
        value: the meta-loss, a scalar.
        losses: of its inner steps, ``(T,)``.
        eval_losses: the same, or ``()``.
        metrics: further tensors by name.
    """

    grads: Tree
    value: Tensor
    losses: Tensor
    eval_losses: Any
    metrics: dict[str, Tensor]


def over_fresh_tasks(
    gradient_of: Callable[[TaskFamily], Callable[..., OfOneTask]],
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int,
    eval_split: str | None,
    chunk_size: int | None,
    ranks: Ranks | None,
) -> Estimator:
    """Mean over tasks of what ``gradient_of(family)`` gives for one.

    Args:
        gradient_of: ``gradient_of(family)`` is ``(meta_params, config, model_params, batches,
            eval_batches) -> OfOneTask``, used under `vmap` over tasks; without an ``eval_split``
            the evaluation batches are those of training.
        family, num_tasks, horizon, eval_split, chunk_size, ranks: of `fmeta.estimators.full`.
    """

    def build(family: TaskFamily, share: Share) -> Estimator:
        of_tasks = torch.vmap(
            gradient_of(family), in_dims=(None, 0, 0, 0, 0), chunk_size=chunk_size
        )

        def init(meta_params: Tree, seed: int) -> FreshTasksState:
            check_meta_params(meta_params)
            return FreshTasksState(checked_seed(seed), 0)

        def estimate(meta_params: Tree, state: FreshTasksState) -> tuple[Estimate, FreshTasksState]:
            check_meta_params(meta_params)
            check_state(state, FreshTasksState)
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
                found = OfOneTask(*of_tasks(meta_params, *stacked, shown))
                bad_step = first_bad_step(_by_step(found.losses), _by_step(found.eval_losses))
                own = {"losses": found.losses, "drawn": torch.tensor(drawn, device=device)}
                metrics = {**found.metrics, **own}
                estimate = mean_over_tasks(found.value, found.grads, bad_step, metrics, share=share)
            return estimate, state._replace(step=state.step + 1)

        return Estimator(init, estimate, share.ranks)

    return over_families(build, family, num_tasks, ranks or Ranks.alone())


def _by_step(losses: Any) -> Tensor | None:
    """``(tasks, T)`` as ``(T, tasks, 1)``; None for no losses."""
    return losses.T.unsqueeze(-1) if isinstance(losses, Tensor) else None
