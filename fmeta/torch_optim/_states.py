"""The hidden state of all parameters in the dict of `torch.optim.Optimizer`, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta.torch_optim._in_place import apart
from fmeta.torch_optim._slots import SKIPPED, Slots, started

__all__ = ["fetch", "holder_of", "own_memory", "skipped_steps", "spread"]

Tree = Any


def fetch(opt: Any, flat: Sequence[Tensor], active: Sequence[int], weights: Tree) -> list[Any]:
    """The dict of each active parameter; those that have none yet get the rule's first state."""
    state, slots = opt.state, opt._slots
    found: list[Any] = [None] * len(flat)
    new = []
    for i in active:
        found[i] = own = state.get(flat[i])
        if own is None or not slots[i].held_by(own):
            if slots[i].keys or opt._shared_slots.keys or opt._nonfinite == "skip":
                new.append(i)
            else:
                found[i] = {}  # a rule without state leaves none, as torch's do
    holder = holder_of(opt, opt._shared_slots)
    if not new:
        return found
    # What belongs to the whole model starts from all that may ever be updated.
    whole = holder is None and opt._shared_slots.keys
    chosen = {*new, *(i for i, p in enumerate(flat) if whole and p.requires_grad)}
    hidden = _first(opt, weights, flat, chosen)
    keys = opt._keys()
    leaves, shared, _ = apart(
        [flat[i] for i in new], {i: hidden.leaves[keys[i]] for i in new}, hidden.shared
    )
    common = opt._shared_slots.entries(shared)
    if holder is not None:
        common = {k: holder[k] for k in opt._shared_slots.keys}
    if opt._nonfinite == "skip":
        common = {**common, SKIPPED: skipped_steps(opt).to(flat[new[0]].device)}
    for i in new:
        found[i] = {**(found[i] or {}), **slots[i].entries(leaves[i]), **common}
        state[flat[i]] = found[i]
    opt._owned = False
    return found


def _first(opt: Any, weights: Tree, flat: Sequence[Tensor], chosen: set[int]) -> Any:
    """The rule's first state of some parameters (and of others, where it cannot leave them out)."""
    rule, horizon = opt._rule, opt._horizon()

    def start(some: set[int]) -> Any:
        values = [p if i in some else None for i, p in enumerate(flat)]
        return started(rule.optimizer, weights, opt._tree(values), horizon)

    try:
        return start(chosen)
    except Exception:
        same = {i for i, p in enumerate(flat) if p.is_floating_point()}
        if same == chosen:
            raise
        return start(same)  # written by hand, perhaps, without a thought of None


def holder_of(opt: Any, slots: Slots) -> Any:
    """The first parameter's dict that holds the state of the whole model."""
    for own in opt.state.values():
        if isinstance(own, dict) and slots.held_by(own):
            return own
    return None


def spread(opt: Any, entries: dict[str, Any]) -> None:
    """Stores what belongs to the whole model with every parameter that has state."""
    if entries:
        for own in opt.state.values():
            if isinstance(own, dict):
                own.update(entries)


def own_memory(opt: Any) -> None:
    """Gives every tensor of the state memory of its own, to be written to from now on."""
    if opt._owned:
        return
    common = set(opt._shared_slots.keys) | {SKIPPED}
    holder = holder_of(opt, opt._shared_slots) or {}
    spread(opt, {k: x.clone() for k, x in holder.items() if k in common})
    for own in opt.state.values():
        if isinstance(own, dict):
            for k, x in own.items():
                if k not in common and isinstance(x, Tensor):
                    own[k] = x.clone()
    opt._owned = True


def skipped_steps(opt: Any) -> Tensor:
    """The count of skipped steps, 0 before the first step."""
    for own in opt.state.values():
        if isinstance(own, dict) and SKIPPED in own:
            return own[SKIPPED]
    return torch.zeros((), dtype=torch.int64)
