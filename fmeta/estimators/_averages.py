"""From the tasks' own values and gradients to one estimate, without the tasks that diverged."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.distributed import Ranks, Share, sum_tree
from fmeta.estimators._contract import Estimate

__all__ = ["first_bad_step", "gathered_tasks", "mean_over_tasks", "squared_norm"]

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
    values: Tensor,
    parts: Tree,
    diverged_at: Tensor,
    metrics: dict[str, Tensor],
    *,
    group: int = 1,
    share: Share | None = None,
) -> Estimate:
    """Mean over the tasks that did not diverge, and how sure it is.

    Args:
        values: the tasks' meta-losses, ``(tasks,)``.
        parts: their gradients, a tree with leading dimension of tasks.
        diverged_at: the inner steps of the trainings at which they did, ``(tasks,)``, -1 for none.
            A task also counts as diverged when its meta-loss or its gradient is not finite.
        metrics: further ones, of tasks in the first dimension; of ``losses`` it is the last but
            one.
        group: this many neighbours are no independent draws of the gradient, and enter its
            standard error together.
        share: which of the tasks these are; the estimate is over those of all ranks. The ranks
            exchange the sum of their gradients, and some numbers for each task.

    Returns:
        An `Estimate`; NaN when all diverged.
    """
    share = share or Share(Ranks.alone(), len(values), each=group)
    own = len(share.own)
    values, parts, diverged_at = trees.map(lambda x: x[:own], (values, parts, diverged_at))
    # The largest number of a row is finite where all are, and quicker to find.
    finite = [_rows(x).abs().amax(1).isfinite() for x in trees.leaves((values, parts))]
    kept = torch.stack([diverged_at < 0, *finite]).all(0)

    def of_kept(x: Tensor) -> Tensor:
        # Not times 0: what diverged may be NaN.
        return torch.where(kept.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)

    sums = trees.map(lambda x: of_kept(x).sum(0, dtype=trees.compute_dtype(x)), parts)
    # The number goes with the sums, in one exchange.
    sums, count = sum_tree((sums, kept.sum().to(trees.leaves(sums)[0])), share.ranks)
    grads = trees.map(lambda s, x: (s / count).to(x.dtype), sums, parts)
    split = (own // group, group)
    apart = trees.map(lambda x, m: x - m, parts, grads)
    if group > 1:
        apart = trees.map(lambda x: of_kept(x).unflatten(0, split).sum(1), apart)
    squares = torch.stack([_squares_of_rows(x) for x in trees.leaves(apart)]).sum(0)
    if group == 1:
        squares = of_kept(squares)
    mine = (values, kept, diverged_at, squares.repeat_interleave(group))
    (values, kept, diverged_at, squares), metrics = gathered_tasks(share, mine, metrics)
    loss = torch.where(kept, values, 0.0).sum() / kept.sum()
    groups = kept.unflatten(0, (-1, group)).any(1).sum()
    error = (squares[::group].sum() * groups / (groups - 1)).sqrt() / kept.sum()
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


def gathered_tasks(
    share: Share, rows: Tree, metrics: dict[str, Tensor]
) -> tuple[Tree, dict[str, Tensor]]:
    """What all ranks know of their tasks, by one exchange.

    Args:
        share: of this rank.
        rows: of its tasks, ``(tasks, ...)``.
        metrics: the same; of ``losses`` tasks are the last dimension but one.

    Returns:
        ``(rows, metrics)`` of all tasks.
    """
    if share.ranks.size == 1:
        return rows, metrics
    dims = {name: x.ndim - 2 if name == "losses" else 0 for name, x in metrics.items()}
    rows, metrics = share.gather(
        (rows, {name: x.movedim(dims[name], 0) for name, x in metrics.items()})
    )
    return rows, {name: x.movedim(0, dims[name]) for name, x in metrics.items()}


def squared_norm(tree: Tree) -> Tensor:
    """Sum of the squares of all elements, a scalar in float64."""
    return torch.stack([x.double().square().sum() for x in trees.leaves(tree)]).sum()


def _rows(x: Tensor) -> Tensor:
    if not math.prod(x.shape):  # of nothing there is no largest number
        return x.new_zeros(len(x), 1)
    return x.reshape(len(x), -1)


def _squares_of_rows(x: Tensor) -> Tensor:
    """Sum of the squares of each ``x[i]``, in float64."""
    norm: Tensor = torch.linalg.vector_norm(_rows(x), 2, 1, dtype=torch.float64)
    return norm.square()
