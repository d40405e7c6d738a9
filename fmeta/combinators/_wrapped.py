"""What wrappers share that keep a state of their own beside the wrapped optimizer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.combinators._parts import check_entries, states_of
from fmeta.optimizer import Hidden

__all__ = ["choose", "unwrapped", "whole", "wrapped"]

Tree = Any


def wrapped(
    model_params: Tree, inner: Hidden, own: Sequence[dict[str, Any]], shared: dict[str, Any]
) -> Hidden:
    """A state with the inner one of each leaf under ``"inner"``, beside what is kept of one's own.

    Args:
        model_params: the parameter tree.
        inner: the state of the wrapped optimizer.
        own: a dict for each leaf; where it is empty, the leaf has no state at all (it is not ours).
        shared: the shared state.
    """
    spec = trees.flatten(model_params)[1]
    leaves = [
        {"inner": s, **mine} if mine else {}
        for s, mine in zip(states_of(model_params, inner), own, strict=True)
    ]
    return Hidden(trees.unflatten(spec, leaves), shared)


def unwrapped(
    model_params: Tree, hidden: Hidden, shared: dict[str, Any], keys: tuple[str, ...]
) -> tuple[Hidden, list[dict[str, Any]]]:
    """The state of the wrapped optimizer, with this shared state, and the dict of each leaf.

    Raises:
        ValueError: unless each dict holds ``"inner"`` and these keys (or the leaf is None).
    """
    flat, spec = trees.flatten(model_params)
    states = states_of(model_params, hidden)
    for p, s in zip(flat, states, strict=True):
        if p is not None:
            check_entries(s, ("inner", *keys), "the hidden state of a leaf")
    inner = trees.unflatten(spec, [s["inner"] if s else s for s in states])
    return Hidden(inner, shared), states


def choose(flag: Tensor, new: Tree, old: Tree) -> Tree:
    """``new`` where the flag is set, otherwise ``old``: two trees of tensors of one structure."""

    def chosen(a: Any, b: Any) -> Any:
        return a if a is b or not isinstance(a, Tensor) else torch.where(flag, a, b)

    return trees.map(chosen, new, old)


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raises unless ``value`` is a whole number, not too small, or a tensor."""
    if isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
