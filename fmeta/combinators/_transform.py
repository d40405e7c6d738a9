"""`to_transform`: the shape of optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fmeta.optimizer import Optimizer, check_needs, check_num_steps, check_optimizer_type

__all__ = ["Transform", "to_transform"]

Tree = Any


class Transform(NamedTuple):
    """An optimizer in the shape of optax: ``init(params)``, ``update(grads, state, params)``."""

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]


def to_transform(optimizer: Optimizer, opt_params: Tree) -> Transform:
    """An optimizer with its learned parameters bound, with the signature of optax.

    Returns:
        A `Transform`: ``init(params, *, num_steps=None) -> state`` and
        ``update(grads, state, params, *, loss=None, extras=None) -> (updates, state)``, in which
        ``updates`` is to be added to the parameters.
    """
    check_optimizer_type(optimizer, "optimizer")

    def init(params: Tree, *, num_steps: Any = None) -> Tree:
        check_num_steps(optimizer.needs, num_steps)
        return optimizer.init_hidden(opt_params, params, num_steps=num_steps)

    def update(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        check_needs(optimizer.needs, extra.get("loss"), extra.get("extras"))
        return optimizer.update(opt_params, params, grads, state, **extra)

    return Transform(init, update)
