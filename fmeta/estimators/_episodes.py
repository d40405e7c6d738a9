"""Whole trainings of an estimate: tasks, and the noise of the steps made in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily, sample_batches, sample_task, stack_tasks

__all__ = ["Drawn", "Episodes", "chunks_of"]

Tree = Any

_NOISE = 6  # a further use of a task's integers, after those of `fmeta.tasks` and other estimators


class Drawn(NamedTuple):
    """What the trainings of an estimate are made of.

    Attributes:
        config, params: ``(tasks, ...)``.
        batches, shown: of training and evaluation, ``(tasks, T, ...)``.
        noise: like the parameters, ``(tasks, rollouts, T, ...)``.
        ints: the integers that fix a task, ``(tasks, 3)``.
    """

    config: Any
    params: Any
    batches: Any
    shown: Any
    noise: Any
    ints: Tensor


class Episodes(NamedTuple):
    """Draws tasks and noise, each from integers ``(seed, estimate, task)``.

    Attributes:
        family: of the tasks.
        tasks: their indices in an estimate.
        rollouts: trainings of each.
        horizon: inner steps of a training.
        eval_split: of the batches shown after each step; None: those of training.
    """

    family: TaskFamily
    tasks: range
    rollouts: int
    horizon: int
    eval_split: str | None

    def draw(self, seed: int, step: int, device: torch.device | None) -> Drawn:
        ints = [(seed, step, i) for i in self.tasks]
        drawn = [self._task(*one) for one in ints]
        config, params, batches, shown, noise = stack_tasks(drawn, device)
        return Drawn(config, params, batches, shown, noise, torch.tensor(ints, device=device))

    def _task(self, *ints: int) -> tuple[Tree, ...]:
        task = sample_task(self.family, self.horizon, *ints)
        shown = task.batches
        if self.eval_split is not None:
            shown = sample_batches(
                self.family, task.config, self.horizon, *ints, split=self.eval_split
            )
        generator = fold_in(*ints, _NOISE)

        def normal(p: Tensor) -> Tensor:
            dtype = trees.compute_dtype(p)
            return torch.randn(self.horizon, *p.shape, generator=generator, dtype=dtype)

        # One rollout after the other, so that none depends on how many there are.
        noise = [trees.map(normal, task.model_params) for _ in range(self.rollouts)]
        return (*task, shown, trees.stack(noise))


def chunks_of(drawn: Drawn, size: int | None) -> list[Drawn]:
    """So many tasks at a time; None: all."""
    tasks = len(drawn.ints)
    size = size or tasks
    return [trees.map(lambda x, i=i: x[i : i + size], drawn) for i in range(0, tasks, size)]
