"""The one contract of all estimators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "Bind",
    "Estimate",
    "Estimator",
    "MetaLoss",
    "bind_opt_params",
    "bound_pair",
    "check_horizon",
    "check_sizes",
    "last_loss",
]

Bind = Callable[[Any, Any], tuple[Any, Any]]
MetaLoss = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


class Estimate(NamedTuple):
    """A meta-loss, its gradient with respect to the meta-parameters, and what else was seen.

    Attributes:
        loss: scalar, over the tasks that did not diverge; NaN when all did.
        grads: like the meta-parameters, over the same tasks.
        metrics: by name, tensors. Of all estimators of fmeta: ``"losses"``; ``"diverged"``
            ``(tasks,)``, which tasks had a loss that is not finite and were left out;
            ``"diverged_at"`` ``(tasks,)``, the first such step, or -1; ``"signal_to_noise"``, norm
            of the mean gradient over that of its standard error over tasks.
    """

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


def bound_pair(bind: Bind, meta_params: Any, config: Any) -> tuple[Any, Any]:
    """``bind(meta_params, config)``, or a ValueError that says what it returned instead."""
    bound = bind(meta_params, config)
    if not isinstance(bound, tuple) or len(bound) != 2:
        raise ValueError(
            f"bind must return (opt_params, model_params or None), got a {type(bound).__name__}"
        )
    return bound


def last_loss(losses: Tensor, evals: Tensor | None, t: Tensor, horizon: Tensor) -> Tensor:
    """The default part of a step in the meta-loss: its evaluation loss, or its training loss."""
    return losses if evals is None else evals


def check_sizes(**sizes: int | None) -> None:
    """Raises a ValueError for a number below 1, or one that is no integer; None is not looked at."""
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_horizon(horizon: int | Sequence[int]) -> None:
    """The same for a horizon, or each of several."""
    several = (horizon,) if isinstance(horizon, int) else tuple(horizon)
    if not several:
        raise ValueError("horizon is empty: give a number of inner steps, or several")
    for value in several:
        check_sizes(horizon=value)
