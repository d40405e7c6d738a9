"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta.functional import layer_activity
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

    def activity(
        params: dict[str, Tensor], x: Tensor, error_of: Callable[[Tensor], Tensor]
    ) -> list[Any]:
        found = []
        for i in range(layers):
            z = x @ params[f"w{i}"] + params[f"b{i}"]
            error = error_of(z) if i == layers - 1 else None
            found.append(layer_activity(x, z, f"w{i}", f"b{i}", out_first=False, error=error))
            x = act(z)
        return found

    return Network(init, apply, activity)
