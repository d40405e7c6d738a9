"""Loss curves of optimizers side by side, with the held-out loss after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta._unroll import unroll
from fmeta.optimizer import Optimizer
from fmeta.tasks import (
    Task,
    TaskFamily,
    extras_of_task,
    loss_of_task,
    sample_batches,
    sample_task,
    stack_tasks,
)
from fmeta.tasks._family import device_of_tasks

__all__ = ["Curves", "compare"]


class Curves(NamedTuple):
    """Losses of one optimizer: ``train`` and ``held_out``, each of shape ``(seeds, steps)``."""

    train: Tensor
    held_out: Tensor


def compare(
    family: TaskFamily,
    contenders: Mapping[str, tuple[Optimizer, Any]],
    *,
    num_steps: int,
    num_seeds: int,
    seed: int,
    split: str = "train",
    held_out: str = "test",
) -> dict[str, Curves]:
    """Trains fresh models with each optimizer, all from the same start and on the same batches.

    Tasks are drawn on the CPU and moved to the device of ``family.data`` (without data: of the
    first ``opt_params``).

    Args:
        family: where the tasks come from.
        contenders: name -> ``(optimizer, opt_params)``.
        num_steps: inner steps T.
        num_seeds: tasks, run together by `vmap`.
        seed: of the tasks; use one that meta-training did not see.
        split: images trained on.
        held_out: images of which a fresh batch is evaluated after each update (``split`` itself:
            the batch of the update, seen again).

    Returns:
        `Curves` by name.
    """
    extras = {name: extras_of_task(family, pair[0]) for name, pair in contenders.items()}
    device = device_of_tasks(family, [opt_params for _, opt_params in contenders.values()])
    tasks, shown = _draw(family, num_steps, num_seeds, seed, split, held_out, device)
    loss_fn = loss_of_task(family)
    result = {}
    for name, (optimizer, opt_params) in contenders.items():

        def one(config: Any, params: Any, batches: Any, eval_batches: Any) -> Any:
            run = unroll(
                optimizer,  # noqa: B023 (used within the iteration)
                loss_fn,
                opt_params,  # noqa: B023
                params,
                batches,
                loss_args=(config,),
                extras=extras[name],  # noqa: B023
                eval_batches=eval_batches,
            )
            return run.losses, run.eval_losses

        with torch.no_grad():
            result[name] = Curves(*torch.vmap(one)(*tasks, shown))
    return result


def _draw(
    family: TaskFamily,
    num_steps: int,
    num_seeds: int,
    seed: int,
    split: str,
    held_out: str,
    device: torch.device | None,
) -> tuple[Task, Any]:
    """Tasks, and for each the batches to evaluate on, stacked."""
    drawn = [sample_task(family, num_steps, seed, i, split=split) for i in range(num_seeds)]
    shown = [
        sample_batches(family, task.config, num_steps, seed, i, split=held_out)
        for i, task in enumerate(drawn)
    ]
    return stack_tasks(drawn, device), stack_tasks(shown, device)
