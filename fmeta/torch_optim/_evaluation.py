"""The parameters to evaluate with, put into the model for a while (averages, schedule-free)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.optimizer import Hidden
from fmeta.torch_optim import _sharded, _states

__all__ = ["put_back", "swap_in"]


@torch.no_grad()
def swap_in(opt: Any) -> list[tuple[Tensor, Tensor]]:
    """Writes the rule's ``eval_params`` into the parameters.

    Returns:
        Each parameter that was changed, with its former value.
    """
    flat, slots, rule = opt._params(), opt._slots, opt._rule
    states = [opt.state.get(p) for p in flat]
    known = [i for i, s in enumerate(states) if s]
    holder = _states.holder_of(opt, opt._shared_slots)
    if not known or holder is None:
        return []  # nothing has been updated yet
    params: list[Any] = [None] * len(flat)
    leaves: list[Any] = [{}] * len(flat)
    for i in known:
        params[i] = _sharded.full(flat[i])
        leaves[i] = trees.map(_sharded.full, slots[i].read(states[i]))
    shared = trees.map(_sharded.full, opt._shared_slots.read(holder))
    shown = rule.optimizer.eval_params(
        opt._weights_on(flat[known[0]].device),
        opt._tree(params),
        Hidden(opt._tree(leaves), shared),
    )
    keys = opt._keys()
    changed = [
        (flat[i], _sharded.shard_like(shown[keys[i]], flat[i]))
        for i in known
        if shown[keys[i]] is not params[i]
    ]
    kept = [(p, p.detach().clone()) for p, _ in changed]
    values = [x.clone() for _, x in changed]  # apart from the parameters, which change now
    for (p, _), x in zip(changed, values, strict=True):
        p.copy_(x)
    return kept


@torch.no_grad()
def put_back(kept: list[tuple[Tensor, Tensor]]) -> None:
    """Gives parameters their former values, bit for bit."""
    for p, x in kept:
        p.copy_(x)
