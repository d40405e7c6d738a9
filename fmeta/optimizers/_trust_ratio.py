"""The trust ratio of LARS and LAMB: a tensor's update is measured by the tensor's own norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta.optimizers._common import safe_sqrt
from fmeta.optimizers._features import sum_of_squares

__all__ = ["trust_ratio"]


def trust_ratio(
    param: Tensor, update: Tensor, batch: int, coefficient: Any = 1.0, eps: Any = 0.0
) -> Tensor:
    """``coefficient * ||param|| / (||update|| + eps)``, or 1 where one of the norms is 0.

    Args:
        param, update: ``(*batch axes, *leaf)``.
        batch: number of leading axes that are not the tensor's own.

    Returns:
        One number a tensor, with axes of size 1 in place of the leaf's. Its derivatives are 0
        where a norm is 0, and finite wherever the dtype can hold them.
    """
    own = tuple(range(batch, param.ndim))
    size, change = (_norm(x, own) for x in (param, update))
    usable = (size > 0) & (change > 0)
    ratio = coefficient * size / (torch.where(usable, change, 1.0) + eps)
    return torch.where(usable, ratio, 1.0)


def _norm(x: Tensor, own: tuple[int, ...]) -> Tensor:
    """Of elements over the largest one: squares and their derivatives stay near 1."""
    largest = x.detach().abs()
    if own and x.numel():
        largest = largest.amax(own, keepdim=True)
    elif own:
        largest = sum_of_squares(largest, own)
    unit = torch.where(largest > 0, largest, 1.0)
    return unit * safe_sqrt(sum_of_squares(x / unit, own))
