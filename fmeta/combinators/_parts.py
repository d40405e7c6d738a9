"""Hidden states of optimizers that are parts of another one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.optimizer import Hidden, Optimizer, check_num_steps

__all__ = [
    "check_entries",
    "delta_dtype",
    "merged",
    "only",
    "part",
    "start",
    "start_some",
    "states_of",
]

Tree = Any


def start(optimizer: Optimizer, opt_params: Tree, model_params: Tree, num_steps: Any) -> Hidden:
    """The hidden state of a part; it must be one that can be split by parameter."""
    check_num_steps(optimizer.needs, num_steps)
    hidden = optimizer.init_hidden(opt_params, model_params, num_steps=num_steps)
    if not isinstance(hidden, Hidden):
        raise ValueError(
            f"the hidden state of a combined optimizer is a {type(hidden).__name__}, which cannot "
            "be split by parameter: let init_hidden return fmeta.optimizer.Hidden(leaves, shared)"
        )
    return hidden


def start_some(
    optimizer: Optimizer,
    opt_params: Tree,
    model_params: Tree,
    where: list[Any],
    key: Any,
    num_steps: Any,
) -> Hidden:
    """`start` for some of the leaves; without any, the shared state still goes to their device."""
    hidden = start(optimizer, opt_params, only(model_params, where, key), num_steps)
    device = next((p.device for p in trees.leaves(model_params) if p is not None), None)
    if key in where or device is None:
        return hidden
    shared = trees.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, hidden.shared)
    return Hidden(hidden.leaves, shared)


def only(tree: Tree, where: list[Any], key: Any) -> Tree:
    """The tree with ``None`` at all leaves but those where ``where`` is ``key``."""
    flat, spec = trees.flatten(tree)
    return trees.unflatten(
        spec, [x if w == key else None for x, w in zip(flat, where, strict=True)]
    )


def states_of(model_params: Tree, hidden: Hidden) -> list[Any]:
    """The dict at each leaf."""
    spec = trees.flatten(model_params)[1]
    return trees.flatten_up_to(spec, hidden.leaves, model_params, "the hidden state")


def merged(model_params: Tree, parts: dict[str, Hidden]) -> Hidden:
    """One state that holds those of the parts under their keys, leaf by leaf."""
    spec = trees.flatten(model_params)[1]
    columns = [states_of(model_params, own) for own in parts.values()]
    leaves = [dict(zip(parts, row, strict=True)) for row in zip(*columns, strict=True)]
    return Hidden(trees.unflatten(spec, leaves), {k: own.shared for k, own in parts.items()})


def part(model_params: Tree, hidden: Hidden, key: str) -> Hidden:
    """The state of the part of that key out of a merged one (an empty leaf is not ours)."""
    spec = trees.flatten(model_params)[1]
    leaves = states_of(model_params, hidden)
    for x in (hidden.shared, *leaves):
        if x or x is hidden.shared:
            check_entries(x, (key,), "the hidden state of a chain")
    return Hidden(trees.unflatten(spec, [x[key] if x else x for x in leaves]), hidden.shared[key])


def check_entries(tree: Any, keys: Collection[str], what: str) -> None:
    """Raises a ValueError unless the tree is a dict that has these keys."""
    absent = [k for k in keys if not isinstance(tree, dict) or k not in tree]
    if absent:
        raise ValueError(
            f"{what} has no entry {', '.join(map(repr, absent))}: is it of another optimizer? Give "
            "what the init() and init_hidden(...) of this one return"
        )


def delta_dtype(delta: Tree) -> torch.dtype:
    """The widest dtype of a delta, at least float32."""
    dtype = torch.float32
    for d in trees.leaves(delta):
        if d is not None:
            dtype = torch.promote_types(dtype, d.dtype)
    return dtype
