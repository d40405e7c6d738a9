"""The inner rule of learners that take gradient descent or another one."""

from __future__ import annotations

from fmeta.optimizer import Optimizer
from fmeta.optimizers import sgd

__all__ = ["inner_rule"]


def inner_rule(lr: float | None, optimizer: Optimizer | None) -> Optimizer:
    """``optimizer``, or gradient descent at ``lr`` (0.1 where that is None too).

    Raises:
        ValueError: both are given, of which the rate would have no effect.
    """
    if optimizer is None:
        return sgd(0.1 if lr is None else lr)
    if lr is not None:
        raise ValueError(
            "lr is the rate of gradient descent, and optimizer another rule in its place: give "
            "one of them (the optimizer's own rate is an argument of its builder)"
        )
    return optimizer
