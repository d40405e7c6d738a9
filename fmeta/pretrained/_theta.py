"""A theta of google/learned_optimization: its arrays by name, each taken once and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from fmeta.pretrained._finite import check_finite

__all__ = ["Theta"]


class Theta:
    """The arrays of a theta by name, taken one by one, checked and copied in float32."""

    def __init__(self, rule_name: str, theta: Any) -> None:
        if not isinstance(theta, Mapping):
            raise ValueError(
                f"the theta of {rule_name} must be a dict of arrays, got a {type(theta).__name__}"
            )
        self.rule_name = rule_name
        self.left: dict[str, tuple[str, Any]] = {}  # by plain name: the name as given, the array
        self.names: list[str] = []
        for name, x in _flat(theta, ""):
            plain = "/".join(part for part in re.split(r"[/.]", name) if part not in ("", "~"))
            if plain in self.left:
                raise ValueError(
                    f"the theta of {rule_name} holds {self.left[plain][0]} and {name}, which are "
                    "one array by two names: give one of them"
                )
            self.left[plain] = name, x
            self.names.append(name)

    def holds(self, name: str) -> bool:
        return name in self.left

    def size(self, name: str, axis: int) -> int | None:
        """Of an axis of the array of that name; None where it has none."""
        if name not in self.left:
            return None
        shape = getattr(self.left[name][1], "shape", ())
        return int(shape[axis]) if -len(shape) <= axis < len(shape) else None

    def take(
        self,
        name: str,
        *shape: int | None,
        also: tuple[str, ...] = (),
        optional: bool = False,
    ) -> Any:
        """The array of that name.

        Args:
            shape: what it must be; None for an axis that may have any length but 0.
            also: other names under which it may be found.
            optional: give None when there is none.
        """
        found = next((k for k in (name, *also) if k in self.left), None)
        if found is None:
            if optional:
                return None
            raise ValueError(
                f"the array {name} of {self.rule_name} is missing: there are "
                f"{', '.join(self.names) or 'none'}"
            )
        given, value = self.left.pop(found)
        x = _tensor(value)
        if x is None:
            raise ValueError(
                f"{given} of {self.rule_name} is no array of real numbers, but a "
                f"{type(value).__name__}"
            )
        fits = x.ndim == len(shape) and all(
            n == want if want is not None else n > 0 for n, want in zip(x.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            wanted += "," if len(shape) == 1 else ""
            raise ValueError(
                f"the array {given} of {self.rule_name} has shape {tuple(x.shape)}, expected "
                f"({wanted})"
            )
        return check_finite(x, f"the array {given} of {self.rule_name}")

    def check_all_taken(self) -> None:
        """Raises a ValueError that names an array which the rule does not have."""
        for name, _ in self.left.values():
            others = ", ".join(n for n in self.names if n != name) or "none"
            raise ValueError(
                f"the array {name} is none of {self.rule_name}: remove it, or give the rule whose "
                f"array it is (the others are {others})"
            )


def _flat(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    """Arrays of nested dicts, tuples and NamedTuples, with ``/`` between the levels."""
    if isinstance(tree, Mapping):
        items = [(str(k), x) for k, x in tree.items()]
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        items = list(zip(tree._fields, tree, strict=True))
    elif isinstance(tree, tuple):
        items = [(str(i), x) for i, x in enumerate(tree)]
    else:
        return [(prefix, tree)]
    return [pair for k, x in items for pair in _flat(x, f"{prefix}/{k}" if prefix else k)]


def _tensor(value: Any) -> Tensor | None:
    """A copy in float32, or None for what is no array of real numbers."""
    if isinstance(value, Tensor):
        return None if value.is_complex() else value.detach().to(torch.float32, copy=True)
    try:
        array = numpy.asarray(value)
    except ValueError:  # lists of several lengths
        return None
    if array.dtype.kind not in "fiu" and "float" not in array.dtype.name:  # bfloat16 is kind "V"
        return None
    with numpy.errstate(over="ignore"):  # what became infinite is told by name
        return torch.from_numpy(numpy.array(array, dtype=numpy.float32))
