"""How good a rule is while it is meta-trained: the loss that it ends with on tasks of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.evaluate._measure import advancing, draw, measure
from fmeta.optimizer import Optimizer
from fmeta.tasks import TaskFamily
from fmeta.tasks._family import device_of_tasks

__all__ = ["Validation"]

_BATCHES = 8  # of the validation split, on which the loss at the end is taken
_WORST = 1e4  # what a loss counts that is larger, or not finite


class Validation:
    """Mean logarithm of the final loss on the validation split, over the same tasks each time.

    So a new best is a better rule, not an easier draw. Logarithms, as in what is meta-trained for:
    a training that fails does not hide the others.

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
        self.rule, self.family = rule, family
        self.num_steps, self.num_seeds = num_steps, num_seeds
        self.advance = advancing(family, rule, num_steps)
        self.drawn = draw(
            family,
            range(num_seeds),
            seed=seed,
            num_steps=num_steps,
            num_points=1,
            num_fresh=_BATCHES,
            split="train",
            held_out="validation",
            device=device_of_tasks(family),
        )

    def __call__(self, opt_params: Any) -> Tensor:
        """The value for these weights, a scalar; lower is better."""
        own = trees.map(lambda x: x.expand(self.num_seeds, *x.shape), opt_params)
        with torch.no_grad():
            found = measure(self.family, self.rule, own, [self.num_steps], self.drawn, self.advance)
        return torch.nan_to_num(found.final, nan=_WORST).clamp(max=_WORST).log().mean()
