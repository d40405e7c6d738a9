"""How good a rule is while it is meta-trained: the loss that it ends with on tasks of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.estimators._trainings import by_steps
from fmeta.optimizer import Optimizer
from fmeta.tasks import TaskFamily, loss_of_task, sample_batches, sample_task, stack_tasks
from fmeta.tasks._family import device_of_tasks

__all__ = ["Validation"]

_BATCHES = 8  # of the validation split, on which the loss at the end is taken


class Validation:
    """Mean logarithm of the final loss on the validation split, over the same tasks each time.

    So a new best is a better rule, not an easier draw. Logarithms, as in what is meta-trained for:
    a training that fails does not hide the others. A loss that is not finite counts as 1e4.

    Args:
        rule: whose ``opt_params`` are judged.
        family: of the tasks.
        num_steps: of each training.
        num_seeds: tasks, run together by `vmap`.
        seed: of the tasks.
    """

    def __init__(
        self, rule: Optimizer, family: TaskFamily, *, num_steps: int, num_seeds: int, seed: int
    ) -> None:
        self.rule, self.num_steps = rule, num_steps
        device = device_of_tasks(family)
        drawn = [sample_task(family, num_steps, seed, i) for i in range(num_seeds)]
        shown = [
            sample_batches(family, task.config, _BATCHES, seed, i, split="validation")
            for i, task in enumerate(drawn)
        ]
        self.tasks, self.shown = stack_tasks(drawn, device), stack_tasks(shown, device)
        self.advance = by_steps(rule, family, evaluate=False, trace=True)
        over_batches = torch.vmap(loss_of_task(family), in_dims=(None, 0, None))
        self.losses = torch.vmap(over_batches)

    def __call__(self, opt_params: Any) -> Tensor:
        """The value for these weights, a scalar; lower is better."""
        tasks = self.tasks
        with torch.no_grad():
            own = trees.map(lambda x: x.expand(len(self), *x.shape), opt_params)
            hidden = torch.vmap(
                lambda th, params: self.rule.init_hidden(th, params, num_steps=self.num_steps)
            )(own, tasks.model_params)
            batches = trees.map(lambda x: x.movedim(1, 0), tasks.batches)
            params, hidden, _, _ = self.advance(
                own, tasks.model_params, hidden, tasks.config, batches, ()
            )
            final = torch.vmap(self.rule.eval_params)(own, params, hidden)
            losses = self.losses(final, self.shown, tasks.config).mean(1)
        return torch.nan_to_num(losses, nan=1e4).clamp(max=1e4).log().mean()

    def __len__(self) -> int:
        return len(trees.leaves(self.tasks.model_params)[0])
