"""`chain`: gradient transforms before an optimizer."""

from __future__ import annotations

from typing import Any

import torch

from fmeta import random
from fmeta._leafwise import applied_as_is, is_transform, transforms_gradients
from fmeta.combinators._parts import merged, part, start
from fmeta.optimizer import Hidden, Optimizer, check_optimizer_type

__all__ = ["chain"]

Tree = Any


def chain(*optimizers: Optimizer) -> Optimizer:
    """Transforms, then an optimizer: the delta of each one is the gradient of the next.

    Args:
        *optimizers: one or more; all but the last act as gradient transforms.

    Returns:
        An `Optimizer` whose ``opt_params`` are a tuple in this order.
    """
    if not optimizers:
        raise ValueError("chain needs at least one optimizer")
    for i, o in enumerate(optimizers):
        check_optimizer_type(o, f"argument {i} of chain")
    keys = [str(i) for i in range(len(optimizers))]
    needs = frozenset().union(*(o.needs for o in optimizers))

    def check(opt_params: Tree) -> None:
        sequence = isinstance(opt_params, (tuple, list))
        if not sequence or len(opt_params) != len(keys):
            got = f"{len(opt_params)} of them" if sequence else f"a {type(opt_params).__name__}"
            raise ValueError(
                f"opt_params of a chain of {len(keys)} are a tuple of {len(keys)} in order, got "
                f"{got}: give what init() returns"
            )

    def init(generator: torch.Generator | None = None) -> Tree:
        generator = random.own(generator)  # one for all: equal parts start unequal
        return tuple(o.init(generator) for o in optimizers)

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check(opt_params)
        parts = {
            k: start(o, th, model_params, num_steps)
            for k, o, th in zip(keys, optimizers, opt_params, strict=True)
        }
        return merged(model_params, parts)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        check(opt_params)
        delta, parts = grads, {}
        for k, o, th in zip(keys, optimizers, opt_params, strict=True):
            own = part(model_params, hidden, k)
            delta, parts[k] = o.update(th, model_params, delta, own, **extra)
        return delta, merged(model_params, parts)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        own = part(model_params, hidden, keys[-1])
        return optimizers[-1].eval_params(opt_params[-1], model_params, own)

    applied_as_is(update, optimizers[-1])
    if all(map(is_transform, optimizers)):
        transforms_gradients(update)
    return Optimizer(init, init_hidden, update, needs, eval_params)
