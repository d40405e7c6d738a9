"""Regression of sine waves from a few points: the toy problem of few-shot learning."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.tasks._family import TaskFamily, check_split
from fmeta.tasks._mlp import mlp
from fmeta.tasks._networks import check_widths

__all__ = ["sinusoid"]


def sinusoid(
    shots: int = 10, widths: tuple[int, ...] = (40, 40), activation: str = "relu"
) -> TaskFamily:
    """Regression of ``amplitude * sin(x + phase)`` by a fully connected network.

    Amplitude uniform in [0.1, 5], phase in [0, pi], x in [-5, 5]; mean squared error.

    Args:
        shots: points in a batch, new ones at every step.
        widths: of the hidden layers, 1-...-1.
        activation: ``"relu"``, ``"tanh"`` or ``"gelu"``.

    Returns:
        A `TaskFamily` with ``config = {"amplitude": (), "phase": ()}``,
        ``model_params = {"w0": (1, width), "b0": (width,), ...}`` and batches x: (steps, shots).

    Raises:
        ValueError: for an unknown activation, or a width or number of shots below 1.

    Reference:
        Finn, Abbeel, Levine: Model-agnostic meta-learning (1703.03400), section 5.1.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    check_widths(widths)
    network = mlp((1, *widths, 1), activation)

    def sample(generator: torch.Generator) -> dict[str, Tensor]:
        amplitude, phase = torch.rand(2, generator=generator)
        return {"amplitude": 0.1 + 4.9 * amplitude, "phase": math.pi * phase}

    def init(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return network.init(generator)

    def batches(
        config: Any, generator: torch.Generator, steps: int, split: str = "train"
    ) -> Tensor:
        check_split(split)
        return 10 * torch.rand(steps, shots, generator=generator) - 5

    def points(config: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        x = batch[:, None]
        return x, config["amplitude"] * torch.sin(x + config["phase"])

    def loss(data: Any, config: Any, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        x, want = points(config, batch)
        return F.mse_loss(network.apply(params, x), want)

    def extras(data: Any, config: Any, params: dict[str, Tensor], batch: Tensor) -> dict[str, Any]:
        assert network.activity is not None
        x, want = points(config, batch)
        return {"activations": network.activity(params, x, lambda out: want - out)}

    return TaskFamily((), sample, init, batches, loss, extras=extras)
