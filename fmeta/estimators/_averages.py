"""From the tasks' own values and gradients to one estimate, without the tasks that diverged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.estimators._contract import Estimate

__all__ = ["first_bad_step", "mean_over_tasks", "squared_norm"]

Tree = Any


def first_bad_step(*losses: Tensor | None) -> Tensor:
    """The first of the estimate's steps at which a task has a loss that is not finite.

    Args:
        *losses: ``(K, tasks, copies)`` each, or None.

    Returns:
        ``(tasks,)``, -1 for a task without such a step.
    """
    bad = torch.stack([~x.isfinite().all(-1) for x in losses if x is not None]).any(0)
    return torch.where(bad.any(0), bad.to(torch.int64).argmax(0), -1)


def mean_over_tasks(
    values: Tensor, parts: Tree, diverged_at: Tensor, metrics: dict[str, Tensor], *, group: int = 1
) -> Estimate:
    """Mean over the tasks that did not diverge, and how sure it is.

    Args:
        values: the tasks' meta-losses, ``(tasks,)``.
        parts: their gradients, a tree with leading dimension of tasks.
        diverged_at: the inner steps of the trainings at which they did, ``(tasks,)``, -1 for none.
            A task also counts as diverged when its meta-loss or its gradient is not finite.
        metrics: further ones.
        group: this many neighbours are no independent draws of the gradient, and enter its
            standard error together.

    Returns:
        An `Estimate`; NaN when all diverged.
    """
    finite = [x.reshape(len(x), -1).isfinite().all(1) for x in trees.leaves((values, parts))]
    kept = torch.stack([diverged_at < 0, *finite]).all(0)
    count = kept.sum()

    def of_kept(x: Tensor) -> Tensor:
        # Not times 0: what diverged may be NaN.
        return torch.where(kept.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)

    loss, grads = trees.map(lambda x: of_kept(x).sum(0) / count, (values, parts))
    apart = trees.map(lambda x, m: of_kept(x - m).unflatten(0, (-1, group)).sum(1), parts, grads)
    groups = kept.unflatten(0, (-1, group)).any(1).sum()
    error = (squared_norm(apart) * groups / (groups - 1)).sqrt() / count
    return Estimate(
        loss,
        grads,
        {
            **metrics,
            "diverged": ~kept,
            "diverged_at": diverged_at,
            "standard_error": error,
            "signal_to_noise": squared_norm(grads).sqrt() / error,
        },
    )


def squared_norm(tree: Tree) -> Tensor:
    """Sum of the squares of all elements, a scalar in float64."""
    return torch.stack([x.double().square().sum() for x in trees.leaves(tree)]).sum()
