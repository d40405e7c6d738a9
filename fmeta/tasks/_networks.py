"""What the networks of task families share: their type, activations and initial weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ACTIVATIONS",
    "Network",
    "activation_named",
    "affine",
    "check_widths",
    "cross_entropy",
    "uniform",
]

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
        activity: ``activity(params, x, error_of) -> layers`` as rules that need activations read
            them, with ``error_of(outputs)`` at the last one; None where that is not known.
    """

    init: Callable[[torch.Generator], dict[str, Tensor]]
    apply: Callable[[dict[str, Tensor], Tensor], Tensor]
    activity: Callable[..., list[Any]] | None = None


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of this name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_widths(widths: Sequence[int]) -> None:
    """Raises a ValueError for a hidden layer without units."""
    for i, width in enumerate(widths):
        if width < 1:
            raise ValueError(f"widths[{i}] must be at least 1, got {width}")


def uniform(generator: torch.Generator, *shape: int, fan_in: int) -> Tensor:
    """Weights of mean 0 and variance ``1 / fan_in``."""
    w = torch.rand(shape, generator=generator)
    return (2 * w - 1) * math.sqrt(3) * (1 / math.sqrt(fan_in))


def affine(params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """``x @ w + b`` with the weights of this name; ``x``: (..., inputs)."""
    # One matrix, for under vmap a product of more dimensions becomes many small ones.
    out = x.flatten(0, -2) @ params[f"{name}.w"] + params[f"{name}.b"]
    return out.unflatten(0, x.shape[:-1])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over a batch, ``logits``: (batch, classes); `torch.nn.functional.cross_entropy`.

    Classes are few, and torch's kernels are several times faster where they are not the last
    dimension.
    """
    return -logits.T.contiguous().log_softmax(0).gather(0, labels[None]).mean()
