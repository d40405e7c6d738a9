"""What a family of tasks is, and how one task is drawn from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fmeta import trees
from fmeta.random import fold_in

__all__ = ["Task", "TaskFamily", "loss_of_task", "sample_task", "stack_tasks"]


class TaskFamily(NamedTuple):
    """Tasks of one static structure, as pure functions. Only ``loss`` is ever vmapped.

    Attributes:
        data: tensors shared by all tasks, stored once.
        sample: ``sample(generator) -> config``, tree of tensors that makes a task.
        init: ``init(config, generator) -> model_params``.
        batches: ``batches(config, generator, steps, split="train") -> batches``, tree of tensors
            with leading dimension ``steps``; small: indices, or noise, that ``loss`` works out.
        loss: ``loss(data, config, model_params, batch) -> scalar``.
    """

    data: Any
    sample: Callable[..., Any]
    init: Callable[..., Any]
    batches: Callable[..., Any]
    loss: Callable[..., Tensor]


class Task(NamedTuple):
    """One drawn task."""

    config: Any
    model_params: Any
    batches: Any


# What a draw is for: the last integer folded into its seed.
_CONFIG, _INIT, _BATCHES = 0, 1, 2


def sample_task(
    family: TaskFamily, steps: int, seed: int, *ints: int, split: str = "train"
) -> Task:
    """One task with its initial parameters and batches; a function of the integers alone.

    Args:
        family: where it comes from.
        steps: number of batches T.
        seed, *ints: what the draw is for (run seed, outer step, task index).
        split: which images (or points) the batches are from.
    """
    config = family.sample(fold_in(seed, *ints, _CONFIG))
    params = family.init(config, fold_in(seed, *ints, _INIT))
    batches = family.batches(config, fold_in(seed, *ints, _BATCHES), steps, split=split)
    return Task(config, params, batches)


def stack_tasks(tasks: list[Task]) -> Task:
    """Tasks side by side, along a new leading dimension, for `vmap`."""
    stacked: Task = trees.stack(tasks)
    return stacked


def loss_of_task(family: TaskFamily) -> Callable[..., Tensor]:
    """The family's loss in the form `fmeta.unroll` takes, with ``loss_args=(config,)``."""

    def loss_fn(params: Any, batch: Any, config: Any) -> Tensor:
        return family.loss(family.data, config, params, batch)

    return loss_fn
