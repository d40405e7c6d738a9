"""What the networks of task families share: their type, activations and initial weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "Network", "activation_named", "affine", "uniform"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


class Network(NamedTuple):
    """A network as two pure functions.

    Attributes:
        init: ``init(generator) -> params``, a flat dict of float32 tensors.
        apply: ``apply(params, x) -> outputs`` with ``x``: (batch, inputs).
    """

    init: Callable[[torch.Generator], dict[str, Tensor]]
    apply: Callable[[dict[str, Tensor], Tensor], Tensor]


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of this name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def uniform(generator: torch.Generator, *shape: int, fan_in: int) -> Tensor:
    """Weights of mean 0 and variance ``1 / fan_in``."""
    w = torch.rand(shape, generator=generator)
    return (2 * w - 1) * math.sqrt(3) * (1 / math.sqrt(fan_in))


def affine(params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """``x @ w + b`` with the weights of this name."""
    return x @ params[f"{name}.w"] + params[f"{name}.b"]
