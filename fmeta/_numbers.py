"""Numbers that a user gives to a builder, checked as it is called."""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fmeta import trees

__all__ = [
    "as_python",
    "check_flag",
    "check_number",
    "check_numbers",
    "check_real",
    "is_whole",
    "nothing_to_learn",
]


def nothing_to_learn(generator: torch.Generator | None = None) -> dict[str, Any]:
    """The ``init`` of a hand-made rule: its numbers are constants."""
    return {}


def check_numbers(name: str, value: Any, **limits: Any) -> None:
    """`check_number` for every Python number of a tree."""
    for x in trees.leaves(value):
        check_number(name, x, **limits)


def check_number(name: str, value: Any, *, below: float = math.inf, positive: bool = False) -> None:
    """Raises a ValueError for a Python number that cannot be meant: NaN, negative, too large.

    Tensors are not looked at (they may be traced, or under vmap).
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} is a tensor of dtype {value.dtype}: use a floating dtype")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        cure = ": put a schedule around the rule, fmeta.scheduled(rule, schedule)"
        raise TypeError(
            f"{name} must be a number, a scalar tensor or a tree of them, got {value!r}"
            + (cure if callable(value) else "")
        )
    if not (0 <= value < below) or (positive and value == 0):
        wanted = "positive" if positive else "not negative"
        limit = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be {wanted} and {limit}, got {value}")


def check_real(**given: Any) -> None:
    """Raises a TypeError, with its name, for what is no real number; ranges are up to others.

    Those of NumPy are numbers. Tensors are not looked at, None is no number.
    """
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, Tensor)):
            raise TypeError(f"{name} must be a number, got {value!r}")


def as_python(tree: Any) -> Any:
    """A tree whose numbers of NumPy are Python's: theirs would take tensors for arrays."""

    def plain(x: Any) -> Any:
        return float(x) if isinstance(x, numbers.Real) and not isinstance(x, bool) else x

    return trees.map(plain, tree)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is an integer, of Python or NumPy, and no flag."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_flag(**flags: Any) -> None:
    """Raises a TypeError, with its name, for what is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
