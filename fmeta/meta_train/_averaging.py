"""A running mean of the meta-parameters over the last outer steps."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fmeta import trees

__all__ = ["Average", "add", "start", "value"]

Tree = Any


class Average(NamedTuple):
    """A mean.

    Attributes:
        mean: shaped like the meta-parameters, in their compute dtype; ``()`` without averaging.
        size: how many it is of.
    """

    mean: Any
    size: int


def start(meta_params: Tree, fraction: float | None) -> Average:
    """The mean of nothing."""
    return Average(() if fraction is None else trees.map(_wide, meta_params), 0)


def add(average: Average, meta_params: Tree) -> Average:
    """The mean of one more: ``mean + (x - mean) / size``."""
    n = average.size + 1

    def towards(mean: Any, x: Any) -> Any:
        return mean + (_wide(x) - mean) / n if n > 1 and isinstance(x, Tensor) else _wide(x)

    return Average(trees.map(towards, average.mean, meta_params), n)


def value(average: Average, like: Tree) -> Tree:
    """The mean, in the dtypes of ``like``."""
    return trees.map(
        lambda mean, x: mean.to(x.dtype) if isinstance(x, Tensor) else x, average.mean, like
    )


def _wide(x: Any) -> Any:
    return x.to(trees.compute_dtype(x)) if isinstance(x, Tensor) else x
