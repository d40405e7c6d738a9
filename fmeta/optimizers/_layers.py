"""The layers of a model, as rules that read activations find them: activity beside parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leaves import Leaves

__all__ = ["Layer", "Place", "flat", "layers_of"]

_NAMES = "abcdefghijklmnopqrstuvwx"  # of axes; Y and Z are terms and batch


class Place(NamedTuple):
    """A parameter of a layer, and the activity before it.

    Attributes:
        leaf: its index in the parameter tree.
        inputs: (batch, units before it).
        shape: of the parameter.
        before, after: letters of its axes on either side; a vector's axis of size one is on none.
    """

    leaf: int
    inputs: Tensor
    shape: torch.Size
    before: str
    after: str

    def product(self, pre: Tensor, post: Tensor) -> Tensor:
        """Sum over batch and terms of all products, shaped like the parameter.

        Args:
            pre: (batch, units before, terms).
            post: (batch, units after, terms).
        """
        letters = f"Z{self.before}Y,Z{self.after}Y->{self._letters()}"
        folded = self._folded(pre, self.before), self._folded(post, self.after)
        return torch.einsum(letters, *folded).reshape(self.shape)

    def down(self, weights: Tensor, signal: Tensor) -> Tensor:
        """The signal (batch, units after) through weights like the parameter: (batch, before)."""
        v = weights.reshape(self._sizes(self._letters()))
        letters = f"{self._letters()},Z{self.after}->Z{self.before}"
        return torch.einsum(letters, v, self._folded(signal, self.after)).flatten(1)

    def _letters(self) -> str:
        return "".join(sorted(set(self.before) | set(self.after)))

    def _sizes(self, letters: str) -> list[int]:
        return [self.shape[_NAMES.index(a)] for a in letters]

    def _folded(self, x: Tensor, letters: str) -> Tensor:
        """``(batch, units, ...)`` with the units along the axes of these letters."""
        return x.reshape(x.shape[0], *self._sizes(letters), *x.shape[2:])


class Layer(NamedTuple):
    """A layer: its parameters, ``outputs`` and, where it is told one, ``error``: (batch, units)."""

    places: list[Place]
    outputs: Tensor
    error: Tensor | None


def flat(x: Tensor) -> Tensor:
    """(batch, units)."""
    return x.reshape(x.shape[0], -1)


def layers_of(activations: Any, at: Leaves) -> list[Layer]:
    """The layers with their activity in the compute dtype, matched with the parameters.

    Args:
        activations: a list of layers as `fmeta.functional.layer_activity` makes them.
        at: the leaves of the update.

    Raises:
        ValueError: no list; a path that is no parameter's; activity that does not fit one.
    """
    if not isinstance(activations, (list, tuple)):
        raise ValueError(
            "activations must be a list of layers from inputs to outputs, as "
            f"fmeta.functional.layer_activity makes them, got a {type(activations).__name__}"
        )
    index = {path: i for i, path in enumerate(trees.paths(at.model_params))}
    paths = [path for given in activations for path in given]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(
                f"the parameter at path {path!r} is in several layers: a weight that layers share "
                "has no one activity beside it; leave it out of all but one of them"
            )
    return [layer for given in activations if (layer := _layer(given, index, at)) is not None]


def _layer(given: Any, index: Mapping[str, int], at: Leaves) -> Layer | None:
    places, outputs, error = [], None, None
    for path, activity in given.items():
        if path not in index:
            raise ValueError(
                f"there are activations at path {path!r}, but no such parameter: there are "
                f"{', '.join(index)}"
            )
        missing = [k for k in ("inputs", "outputs") if k not in activity]
        if missing:
            raise ValueError(f"the activations at path {path!r} lack {' and '.join(missing)}")
        param = at.params[index[path]]
        if param is None:
            continue
        dtype = trees.compute_dtype(param)
        x, z = (activity[k].to(dtype) for k in ("inputs", "outputs"))
        before, after = (_axes(side, param, path) for side in (x, z))
        if _together(before, after, param) or x.shape[0] != z.shape[0]:
            raise ValueError(
                f"the activations at path {path!r} have shapes {tuple(x.shape)} (inputs) and "
                f"{tuple(z.shape)} (outputs), which do not make (batch, "
                f"{', '.join(map(str, param.shape))}) together: see fmeta.functional.layer_activity"
            )
        if param.ndim > 1:  # an axis of size one that no side shows: one unit before the weight
            before = "".join(sorted({*before, *_NAMES[: param.ndim]} - set(after)))
        places.append(Place(index[path], flat(x), param.shape, before, after))
        outputs = flat(z) if outputs is None else outputs
        if error is None and "error" in activity:
            error = flat(activity["error"].to(dtype))
            if error.shape != outputs.shape:
                raise ValueError(
                    f"the error at path {path!r} is that of {error.shape[1]} units (batch "
                    f"{error.shape[0]}), the layer has {outputs.shape[1]} (batch "
                    f"{outputs.shape[0]}): give one number for each of its outputs"
                )
    return None if outputs is None or not outputs.numel() else Layer(places, outputs, error)


def _axes(side: Tensor, param: Tensor, path: str) -> str:
    """Letters of the axes that one side has; the others are of size one."""
    fits = side.ndim == param.ndim + 1 and all(
        n in (1, m) for n, m in zip(side.shape[1:], param.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"the activations at path {path!r} have shape {tuple(side.shape)}, which does not "
            f"broadcast to (batch, {', '.join(map(str, param.shape))}): see "
            "fmeta.functional.layer_activity"
        )
    return "".join(a for a, n in zip(_NAMES, side.shape[1:], strict=False) if n != 1)


def _together(before: str, after: str, param: Tensor) -> bool:
    """Whether an axis belongs to neither side."""
    both = set(before) | set(after)
    return any(n != 1 and a not in both for a, n in zip(_NAMES, param.shape, strict=False))
