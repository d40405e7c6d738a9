"""`scheduled`: a factor that depends on time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import refuse_scaling
from fmeta.combinators._parts import check_entries, delta_dtype, start
from fmeta.optimizer import Hidden, Optimizer, as_needs, check_num_steps, check_optimizer_type

__all__ = ["scheduled"]

Tree = Any


def scheduled(
    optimizer: Optimizer,
    schedule: Callable[[Tensor, Tensor | None], Any],
    *,
    needs: Iterable[str] = (),
) -> Optimizer:
    """The optimizer's delta times ``schedule(t, num_steps)``.

    Args:
        optimizer: any `Optimizer`.
        schedule: ``schedule(t, num_steps) -> factor``, of `fmeta.schedules` or your own; t counts
            the updates before this one (0 at the first), as a scalar tensor in the compute dtype,
            as is ``num_steps``, which is ``None`` when `init_hidden` was called without.
        needs: ``{"num_steps"}`` when the schedule cannot do without the horizon: then a missing
            one is an error of `init_hidden` that names it. Those of `fmeta.schedules` say so
            themselves.

    Returns:
        An `Optimizer` with the same ``opt_params``; the global t stands in ``hidden.shared``.
    """
    check_optimizer_type(optimizer, "optimizer")
    refuse_scaling(optimizer, "scheduled")
    if not callable(schedule):
        raise TypeError(
            f"schedule must be a function of (t, num_steps), got {schedule!r}: for a constant "
            "factor give lambda t, num_steps: factor"
        )
    all_needs = optimizer.needs | as_needs(needs) | as_needs(getattr(schedule, "needs", ()))

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_num_steps(all_needs, num_steps)
        own = start(optimizer, opt_params, model_params, num_steps)
        device = trees.common_device(model_params)
        shared = {"t": torch.zeros((), dtype=torch.int64, device=device), "inner": own.shared}
        if num_steps is not None:
            shared["num_steps"] = torch.as_tensor(num_steps, device=device)
        return Hidden(own.leaves, shared)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        check_entries(hidden.shared, ("t", "inner"), "the shared hidden state of `scheduled`")
        own = Hidden(hidden.leaves, hidden.shared["inner"])
        delta, own = optimizer.update(opt_params, model_params, grads, own, **extra)
        dtype = delta_dtype(delta)
        t, horizon = hidden.shared["t"], hidden.shared.get("num_steps")
        try:
            factor = schedule(t.to(dtype), None if horizon is None else horizon.to(dtype))
        except TypeError as error:
            if horizon is not None:
                raise
            raise ValueError(
                f"the schedule failed ({error}), and there is no num_steps: if it reads it, call "
                'init_hidden(..., num_steps=...), and say scheduled(..., needs={"num_steps"})'
            ) from error
        delta = trees.map(lambda d: None if d is None else d * _as(factor, d), delta)
        return delta, Hidden(own.leaves, {**hidden.shared, "t": t + 1, "inner": own.shared})

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        own = Hidden(hidden.leaves, hidden.shared["inner"])
        return optimizer.eval_params(opt_params, model_params, own)

    return Optimizer(optimizer.init, init_hidden, update, all_needs, eval_params)


def _as(factor: Any, delta: Tensor) -> Any:
    return factor.to(delta.dtype) if isinstance(factor, Tensor) else factor
