"""Optimizers side by side: same initial parameters, same batches, several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta._unroll import unroll
from fmeta.optimizer import Optimizer
from fmeta.tasks import Task, TaskFamily, loss_of_task, sample_batches, sample_task, stack_tasks
from fmeta.tasks._family import device_of_tasks

__all__ = ["Curves", "compare", "final_loss", "paired_difference", "tune"]


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
                eval_batches=eval_batches,
            )
            return run.losses, run.eval_losses

        with torch.no_grad():
            result[name] = Curves(*torch.vmap(one)(*tasks, shown))
    return result


def tune(
    family: TaskFamily,
    builder: Callable[..., Optimizer],
    rates: Sequence[float],
    *,
    num_steps: int,
    num_seeds: int,
    seed: int,
) -> float:
    """The learning rate with the lowest final loss on validation images, training on others.

    Args:
        family: where the tasks come from.
        builder: ``builder(lr) -> Optimizer``; all rates run together by `vmap`.
        rates: candidates.
        num_steps, num_seeds, seed: as in `compare`.

    Returns:
        One of ``rates``. A rate whose loss is not finite never wins.

    Raises:
        ValueError: when the loss is finite for none of the rates.
    """
    device = device_of_tasks(family)
    tasks, shown = _draw(family, num_steps, num_seeds, seed, "train", "validation", device)
    loss_fn = loss_of_task(family)

    def one(lr: Tensor, config: Any, params: Any, batches: Any, eval_batches: Any) -> Tensor:
        losses: Tensor = unroll(
            builder(lr),
            loss_fn,
            {},
            params,
            batches,
            loss_args=(config,),
            eval_batches=eval_batches,
        ).eval_losses
        return losses

    with torch.no_grad():
        by_seed = torch.vmap(one, in_dims=(None, 0, 0, 0, 0))
        by_rate = torch.vmap(by_seed, in_dims=(0, None, None, None, None))
        losses = by_rate(torch.tensor(rates, device=device), *tasks, shown)
    score = final_loss(losses).mean(-1)
    score = torch.where(score.isfinite(), score, torch.inf)
    if not score.isfinite().any():
        raise ValueError(f"the final loss is not finite for any of the rates {list(rates)}")
    return rates[int(score.argmin())]


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


def final_loss(losses: Tensor) -> Tensor:
    """Mean over the last tenth of the steps: ``(..., T) -> (...)``."""
    return losses[..., -max(1, losses.shape[-1] // 10) :].mean(-1)


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Mean of ``a - b`` over seeds with its 95 % interval by Student's t.

    Args:
        a, b: shape ``(seeds,)``, the same seeds in the same order, at least two.

    Returns:
        ``(mean, low, high)``.

    Example:
        >>> paired_difference(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))[0]
        2.0
    """
    from scipy.stats import t  # comes with scikit-learn; slow to import

    d = (a - b).double()
    n = len(d)
    if n < 2:
        raise ValueError("a paired interval needs at least two seeds")
    half = float(t.ppf(0.975, n - 1)) * float(d.std()) / n**0.5
    mean = float(d.mean())
    return mean, mean - half, mean + half
