"""What the rules share: checks of their numbers, counts, a root with a finite derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._numbers import check_number, check_numbers, nothing_to_learn

__all__ = [
    "bias_correction",
    "check_number",
    "check_numbers",
    "count",
    "nothing_to_learn",
    "safe_sqrt",
]


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with derivative 0 (of every order) instead of infinity at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def count(param: Tensor) -> Tensor:
    """A step count of one leaf, before the first step."""
    return torch.zeros((), dtype=torch.int64, device=param.device)


def bias_correction(beta: Any, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 - beta ** steps`` in the compute dtype."""
    return 1 - torch.pow(beta, steps.to(dtype))
