"""Square roots whose derivatives stay finite."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["safe_sqrt"]


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with derivative 0 (of every order) instead of infinity at 0.

    It is 0 below 0, where rounding may lead; a NaN stays one, for who divides by a 0 in its place
    makes a huge step.
    """
    none = x <= 0
    return torch.where(none, 0.0, torch.where(none, 1.0, x).sqrt())
