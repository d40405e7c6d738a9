"""What the rules share: checks of their numbers, counts, a root with a finite derivative."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta._numbers import check_number, check_numbers, nothing_to_learn
from fmeta._roots import safe_sqrt

__all__ = [
    "bias_corrections",
    "check_number",
    "check_numbers",
    "count",
    "ema",
    "ema_of_squares",
    "nothing_to_learn",
    "one_minus",
    "safe_sqrt",
]


def count(param: Tensor) -> Tensor:
    """A step count of one leaf, before the first step."""
    return torch.zeros((), dtype=torch.int64, device=param.device)


def ema(average: Tensor, value: Tensor, beta: Any, out: Tensor | None = None) -> Tensor:
    """``beta * average + (1 - beta) * value``, in one operation."""
    return torch.lerp(average, value, 1 - beta, out=out)


def ema_of_squares(average: Tensor, value: Tensor, beta: Any) -> Tensor:
    """`ema` of ``value ** 2``; with a number as beta, one that is infinite stays so.

    It is not NaN then at the next value: the coordinate stands still, as in torch.
    """
    if isinstance(beta, (int, float)):
        return torch.addcmul(beta * average, value, value, value=1 - beta)
    return ema(average, value * value, beta)


def one_minus(decay: float) -> float:
    """``1 - decay`` as float32 has it, 1.7e-4 off at 0.9999: what references were trained with."""
    return _rounded(1 - _rounded(decay))


def _rounded(x: float) -> float:
    """To the 24 bits of a float32 (Veltkamp's splitting); a tensor would break a compiled graph."""
    wide = x * (2.0**29 + 1)
    return wide - (wide - x)


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
