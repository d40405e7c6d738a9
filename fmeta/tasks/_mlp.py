"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmeta.tasks._networks import Network, activation_named, uniform

__all__ = ["mlp"]


def mlp(sizes: Sequence[int], activation: str) -> Network:
    """Layers ``w0: (sizes[0], sizes[1])``, ``b0: (sizes[1],)``, ...; the last one is linear."""
    act = activation_named(activation)
    layers = len(sizes) - 1

    def init(generator: torch.Generator) -> dict[str, Tensor]:
        params = {}
        for i in range(layers):
            params[f"w{i}"] = uniform(generator, sizes[i], sizes[i + 1], fan_in=sizes[i])
            params[f"b{i}"] = torch.zeros(sizes[i + 1])
        return params

    def apply(params: dict[str, Tensor], x: Tensor) -> Tensor:
        for i in range(layers):
            x = x @ params[f"w{i}"] + params[f"b{i}"]
            if i < layers - 1:
                x = act(x)
        return x

    return Network(init, apply)
