"""Sine waves from a few points, as episodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._contract import Episode, Examples
from fmeta.fewshot._source import Source

__all__ = ["sinusoid"]


def sinusoid(shots: int = 10, queries: int = 10) -> Source:
    """Regression of ``amplitude * sin(x - phase)`` from K points.

    Amplitude uniform in [0.1, 5], phase in [0, pi], x in [-5, 5]. Every split has new waves.

    Args:
        shots: support points K.
        queries: query points.

    Returns:
        A `Source` of inputs ``(points, 1)`` and targets ``(points, 1)``.

    Raises:
        ValueError: numbers that are no integers above 0.

    Reference:
        Finn, Abbeel, Levine: "Model-agnostic meta-learning" (1703.03400), section 5.1.
    """
    check_sizes(shots=shots, queries=queries)

    def sample(generator: torch.Generator, split: str = "train") -> Episode:
        amplitude, phase = torch.rand(2, generator=generator)
        amplitude, phase = 0.1 + 4.9 * amplitude, math.pi * phase

        def points(n: int) -> Examples:
            x: Tensor = 10 * torch.rand(n, 1, generator=generator) - 5
            return Examples(x, amplitude * torch.sin(x - phase))

        return Episode(points(shots), points(queries))

    return Source(sample, 0, shots, queries, (1,), "sinusoid")
