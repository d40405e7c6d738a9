"""Perturbations of the meta-parameters, each a function of its integers alone.

So a process that knows the integers can draw again what another one tried, and need not be sent it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._numbers import as_python
from fmeta.random import fold_in

__all__ = ["PERTURBATION", "Name", "Noise", "Perturb", "Std"]

Tree = Any
Name = tuple[int, ...]  # seed, estimate, particle and further integers
Std = float | Tree
Perturb = Callable[[Tree, int, int], Tree]

PERTURBATION = 4  # among the integers of a name: a further use of the integers of a task


class Noise:
    """Normal perturbations with a standard deviation for each tensor.

    Args:
        std: a positive number, or a tree like the meta-parameters of numbers or of tensors that
            broadcast to theirs.
        perturb: ``perturb(meta_params, estimate, particle) -> eps``, in place of normal draws.

    Raises:
        ValueError: a ``std`` that is not positive and finite, with its path.
    """

    def __init__(self, std: Std, perturb: Perturb | None = None) -> None:
        self.perturb = perturb
        self.std: Std = as_python(std)
        for path, x in zip(trees.paths(std), trees.leaves(self.std), strict=True):
            if isinstance(x, Tensor) and x.is_meta:
                continue
            values = x.flatten().tolist() if isinstance(x, Tensor) else [x]
            for value in values:
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ValueError(f"std must be a number{_at(path)}, got {value!r}")
                if not 0 < value < math.inf:
                    raise ValueError(f"std must be positive and finite{_at(path)}, got {value}")

    def check(self, meta_params: Tree) -> None:
        """Raises a ValueError for a ``std`` that does not fit the meta-parameters."""
        self._scales(meta_params, None)

    def draw(self, meta_params: Tree, name: Name) -> Tree:
        """The perturbation of this name, on the CPU."""
        if self.perturb is not None:
            eps = self.perturb(meta_params, name[1], name[2])
            trees.match(meta_params, eps, "what perturb returned", allow_none=False)
            return eps
        if all(x.is_meta for x in trees.leaves(meta_params)):
            return trees.map(torch.empty_like, meta_params)
        generator = fold_in(*name)

        def normal(x: Tensor, std: float | Tensor) -> Tensor:
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            return (std * drawn).to(x.dtype)

        return trees.map(normal, meta_params, self._scales(meta_params, "cpu"))

    def stacked(self, meta_params: Tree, names: list[Name]) -> Tree:
        """The perturbations of these names side by side, where the meta-parameters are."""
        drawn = {name: self.draw(meta_params, name) for name in dict.fromkeys(names)}
        rows = trees.stack([drawn[name] for name in names])
        return trees.map(lambda x, e: e.to(x.device), meta_params, rows)

    def over_variance(self, meta_params: Tree, eps: Tree) -> Tree:
        """``eps / std^2`` for trees with leading dimensions."""
        scales = self._scales(meta_params, None)
        return trees.map(lambda x, e, std: e / std**2, meta_params, eps, scales)

    def _scales(self, meta_params: Tree, device: str | None) -> Tree:
        """A tree like the meta-parameters of numbers and tensors."""
        flat, spec = trees.flatten(meta_params)
        if isinstance(self.std, (int, float)):
            return trees.unflatten(spec, [self.std] * len(flat))
        if isinstance(self.std, Tensor) and not isinstance(meta_params, Tensor):
            found = [self.std] * len(flat)
        else:
            found = trees.flatten_up_to(spec, self.std, meta_params, "std")
        placed = []
        for path, x, std in zip(trees.paths(meta_params), flat, found, strict=True):
            if isinstance(std, Tensor):
                _check_broadcasts(std, x, path)
                std = std.detach().to(device or x.device, x.dtype)
            placed.append(std)
        return trees.unflatten(spec, placed)


def _check_broadcasts(std: Tensor, x: Tensor, path: str) -> None:
    try:
        fits = torch.broadcast_shapes(std.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"std{_at(path)} has shape {tuple(std.shape)}, which does not broadcast to that of the "
            f"meta-parameter, {tuple(x.shape)}: give a number for the whole tensor"
        )


def _at(path: str) -> str:
    return "" if path == "<root>" else f" at path {path}"
