"""From the tasks' parts to one estimate: what diverged is left out, how sure is the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees

__all__ = ["find_diverged", "mean_over_tasks", "noise_ratio"]

Tree = Any


def find_diverged(*losses: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tasks with a loss that is not finite.

    Args:
        *losses: ``(K, tasks, copies)`` each, or None.

    Returns:
        ``(diverged, at)``, each ``(tasks,)``: whether, and the first such step or -1.
    """
    bad = torch.stack([~x.isfinite().all(-1) for x in losses if x is not None]).any(0)
    diverged = bad.any(0)
    return diverged, torch.where(diverged, bad.to(torch.int64).argmax(0), -1)


def mean_over_tasks(parts: Tree, kept: Tensor) -> tuple[Tree, Tensor]:
    """Mean of the tasks' gradients, and how far it stands out of its own noise.

    Args:
        parts: tree with leading dimension of tasks.
        kept: ``(tasks,)``, which of them count.

    Returns:
        ``(mean, ratio)``: the ratio is the norm of the mean over the norm of its standard error
        (NaN for fewer than two tasks). Without any task the mean is NaN.
    """
    count = kept.sum()

    def of(x: Tensor) -> Tensor:
        return kept.reshape(-1, *(1,) * (x.ndim - 1))

    # Not times 0: what diverged may be NaN.
    mean = trees.map(lambda x: torch.where(of(x), x, 0.0).sum(0) / count, parts)
    spread = trees.map(lambda x, m: torch.where(of(x), x - m, 0.0), parts, mean)
    variance = _square(spread) / (count - 1)
    return mean, noise_ratio(mean, variance / count)


def noise_ratio(mean: Tree, variance: Tensor) -> Tensor:
    """``||mean|| / sqrt(variance)``, the variance being the trace of the mean's covariance."""
    return (_square(mean) / variance).sqrt()


def _square(tree: Tree) -> Tensor:
    return torch.stack([x.double().square().sum() for x in trees.leaves(tree)]).sum()
