"""Several families to meta-train on at once, each with its share of the tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fmeta.tasks._family import TaskFamily

__all__ = ["Mixture", "mixture"]


class Mixture(NamedTuple):
    """Families, each of one static structure, and what share of the tasks is from each.

    Attributes:
        families: at least one.
        weights: their shares, positive, of sum 1.
    """

    families: tuple[TaskFamily, ...]
    weights: tuple[float, ...]


def mixture(families: Sequence[TaskFamily], weights: Sequence[float] | None = None) -> Mixture:
    """Several families side by side.

    Tasks of different structure cannot be stacked for `vmap`, so a mixture stays a list: whoever
    draws from it works on one family at a time.

    Args:
        families: at least one.
        weights: their shares of the tasks, in any positive unit; None: equal ones.

    Returns:
        A `Mixture`, its weights divided by their sum.

    Raises:
        ValueError: for no family, another number of weights, or one that is not positive.
        TypeError: for anything but a `TaskFamily`.

    Example:
        >>> from fmeta.tasks import digits
        >>> mixture([digits((16,)), digits((16,), model="cnn")], weights=(3, 1)).weights
        (0.75, 0.25)
    """
    families = tuple(families)
    if not families:
        raise ValueError("a mixture needs at least one family, got none")
    for i, family in enumerate(families):
        if not isinstance(family, TaskFamily):
            raise TypeError(f"families[{i}] must be a TaskFamily, got a {type(family).__name__}")
    shares = (1.0,) * len(families) if weights is None else tuple(float(w) for w in weights)
    if len(shares) != len(families):
        raise ValueError(
            f"{len(shares)} weights for {len(families)} families: give one for each, or none"
        )
    for i, weight in enumerate(shares):
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weights[{i}] must be positive and finite, got {weight}")
    total = sum(shares)
    return Mixture(families, tuple(w / total for w in shares))
