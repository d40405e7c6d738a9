"""`with_weight_decay`: decoupled weight decay."""

from __future__ import annotations

from typing import Any

from fmeta import trees
from fmeta._leafwise import is_leafwise, leafwise, refuse_scaling
from fmeta._leaves import per_leaf
from fmeta._numbers import check_numbers
from fmeta.optimizer import Optimizer, check_num_steps, check_optimizer_type

__all__ = ["with_weight_decay"]

Tree = Any


def with_weight_decay(optimizer: Optimizer, rate: Any) -> Optimizer:
    """Decoupled weight decay: ``delta - rate * p`` (not times a learning rate).

    Args:
        optimizer: any `Optimizer`.
        rate: a number, a scalar tensor, or a tree of them shaped like the parameters.

    Returns:
        An `Optimizer` with the same ``opt_params`` and hidden state.
    """
    check_optimizer_type(optimizer, "optimizer")
    refuse_scaling(optimizer, "with_weight_decay")
    check_numbers("rate", rate)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Tree, **extra: Any
    ) -> tuple[Tree, Tree]:
        delta, hidden = optimizer.update(opt_params, model_params, grads, hidden, **extra)
        flat, spec = trees.flatten(model_params)
        rates = per_leaf(rate, model_params, spec, "rate")
        changes = trees.match(model_params, delta, "the optimizer's delta")
        return trees.unflatten(
            spec,
            [
                None if d is None else d - r * p.to(trees.compute_dtype(p))
                for d, p, r in zip(changes, flat, rates, strict=True)
            ],
        ), hidden

    if is_leafwise(optimizer):
        leafwise(update)

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Tree:
        check_num_steps(optimizer.needs, num_steps)
        return optimizer.init_hidden(opt_params, model_params, num_steps=num_steps)

    return optimizer._replace(init_hidden=init_hidden, update=update)
