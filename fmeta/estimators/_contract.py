"""The one contract of all estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Bind", "Estimate", "Estimator", "bind_opt_params"]

Bind = Callable[[Any, Any], tuple[Any, Any]]


class Estimate(NamedTuple):
    """A meta-loss, its gradient with respect to the meta-parameters, and what else was seen."""

    loss: Tensor
    grads: Any
    metrics: dict[str, Any]


class Estimator(NamedTuple):
    """Estimates the meta-gradient.

    Attributes:
        init: ``init(meta_params, seed) -> state``, of integers and tensors only.
        estimate: ``estimate(meta_params, state) -> (Estimate, state)``.
    """

    init: Callable[[Any, int], Any]
    estimate: Callable[[Any, Any], tuple[Estimate, Any]]


def bind_opt_params(meta_params: Any, config: Any) -> tuple[Any, Any]:
    """The default ``bind``: the meta-parameters are the optimizer's, models start by the family."""
    return meta_params, None
