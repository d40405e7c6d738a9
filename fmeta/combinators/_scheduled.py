"""`scheduled`: a factor that depends on time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.combinators._parts import delta_dtype, start
from fmeta.optimizer import Hidden, Optimizer

__all__ = ["scheduled"]

Tree = Any


def scheduled(optimizer: Optimizer, schedule: Callable[[Tensor, Tensor | None], Any]) -> Optimizer:
    """The optimizer's delta times ``schedule(t, num_steps)``.

    Args:
        optimizer: any `Optimizer`.
        schedule: ``schedule(t, num_steps) -> factor``; t counts the updates before this one (0 at
            the first), as a scalar tensor in the compute dtype, as is ``num_steps``, which is
            ``None`` when `init_hidden` was called without.

    Returns:
        An `Optimizer` with the same ``opt_params``; the global t stands in ``hidden.shared``.
    """

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        own = start(optimizer, opt_params, model_params, num_steps)
        device = trees.common_device(model_params)
        shared = {"t": torch.zeros((), dtype=torch.int64, device=device), "inner": own.shared}
        if num_steps is not None:
            shared["num_steps"] = torch.as_tensor(num_steps, device=device)
        return Hidden(own.leaves, shared)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        own = Hidden(hidden.leaves, hidden.shared["inner"])
        delta, own = optimizer.update(opt_params, model_params, grads, own, **extra)
        dtype = delta_dtype(delta)
        t, horizon = hidden.shared["t"], hidden.shared.get("num_steps")
        factor = schedule(t.to(dtype), None if horizon is None else horizon.to(dtype))
        delta = trees.map(lambda d: None if d is None else d * factor, delta)
        return delta, Hidden(own.leaves, {**hidden.shared, "t": t + 1, "inner": own.shared})

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        own = Hidden(hidden.leaves, hidden.shared["inner"])
        return optimizer.eval_params(opt_params, model_params, own)

    return Optimizer(optimizer.init, init_hidden, update, optimizer.needs, eval_params)
