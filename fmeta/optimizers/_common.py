"""What the rules share: checks of their numbers, counts, a root with a finite derivative."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta._numbers import check_number, check_numbers, nothing_to_learn

__all__ = [
    "bias_corrections",
    "check_number",
    "check_numbers",
    "count",
    "ema",
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


def ema(average: Tensor, value: Tensor, beta: Any, out: Tensor | None = None) -> Tensor:
    """``beta * average + (1 - beta) * value``, in one operation."""
    return torch.lerp(average, value, 1 - beta, out=out)


def bias_corrections(betas: tuple[Any, Any], steps: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """``1 - beta ** steps`` of two betas, in the compute dtype.

    As ``-expm1(steps * log(beta))``: in float32 the plain form loses four digits at beta = 0.9999.
    """
    t = steps.to(dtype)
    return -torch.expm1(t * _log(betas[0])), -torch.expm1(t * _log(betas[1]))


def _log(beta: Any) -> Any:
    if isinstance(beta, Tensor):
        return beta.clamp_min(torch.finfo(beta.dtype).tiny).log()
    return math.log(beta) if beta else -math.inf
