"""Initial weights of learned rules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["truncated_normal"]

_INSIDE = math.erf(math.sqrt(2))  # of a normal distribution within two deviations


def truncated_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights of a layer: normal, deviation ``1 / sqrt(inputs)`` before a cut at two of it.

    ``w = sqrt(2) std erfinv(u)``, u uniform on ``+- erf(sqrt(2))``: no draw is looked at, so that
    weights may be fake tensors.

    Args:
        shape: ``(*banks, inputs, outputs)``, or ``(inputs,)``.
        generator: of the uniform numbers.

    Returns:
        float32.
    """
    std = max(shape[-2:][0], 1) ** -0.5
    u = torch.rand(shape, generator=generator, dtype=torch.float32)
    x = math.sqrt(2) * torch.erfinv(_INSIDE * (2 * u - 1))
    return std * x.clamp(-2, 2)  # against rounding
