"""Advantages in units of their own spread, so that no task and no step outweighs the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["NORMALIZERS", "normalized"]

NORMALIZERS = (None, "task", "step")

_LEAST = 1e-12  # a variance, relative to the mean over steps: below is rounding


def normalized(advantages: Tensor, by: Any) -> Tensor:
    """``A / s``, with s the standard deviation among the task's *other* rollouts.

    That of all rollouts would depend on the training that it is for. The mean of the others is
    taken away from them, and with it what a baseline made of rollouts has of this training.

    Args:
        advantages: ``(T, tasks, rollouts)``, at least three rollouts.
        by: ``"task"``: one s for all steps of a training, the root of their mean variance;
            ``"step"``: one for each; None: 1.

    Returns:
        Like ``advantages``; 0 where the others do not differ.
    """
    if by is None:
        return advantages
    number = advantages.shape[-1]
    away = advantages.double()
    away = away - away.mean(-1, keepdim=True)
    # Of the others: their sum is minus the own one.
    squares = away.square().sum(-1, keepdim=True) - away.square()
    variance = (squares - away.square() / (number - 1)).clamp_min(0) / (number - 2)
    whole = variance.mean(0, keepdim=True)
    variance = whole.expand_as(variance) if by == "task" else variance
    scaled = advantages / variance.sqrt().to(advantages.dtype)
    return torch.where(variance > _LEAST * whole, scaled, 0.0)
