"""One parameter's hidden state as torch keeps it: a flat dict of tensors by path.

`torch.optim.Optimizer.state` holds a dict for each parameter, and what saves, shards and moves
optimizers (state_dict, torch.distributed.checkpoint, FSDP, ZeRO) expects tensors in it. A hidden
dict that is nested is kept under its paths, ``"inner/m"``; state of the whole model stands in the
dict of every parameter, as the same tensors, under ``"shared/..."``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import _files, trees
from fmeta.optimizer import Hidden, Optimizer
from fmeta.torch_optim import _sharded

__all__ = ["SHARED", "SKIPPED", "Slots", "slots_of", "started"]

Tree = Any
SHARED = "shared/"
SKIPPED = "skipped_steps"


class Slots(NamedTuple):
    """What the hidden state of one leaf (or of the whole model) consists of.

    Attributes:
        keys: paths of its entries.
        spec: its structure.
        flat: whether it is a plain dict whose keys are the paths.
        nested: where its dicts are plain ones: its keys, each with its path or a dict of such.
        kinds: shape and dtype of each entry (None where it is no tensor).
    """

    keys: tuple[str, ...]
    spec: Any
    flat: bool
    nested: dict[str, Any] | None
    kinds: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Tree, prefix: str = "") -> Slots:
        """The slots of a state; keys get the prefix."""
        entries = _files.by_path(tree)
        for key in entries:
            if not prefix and (key.startswith(SHARED) or key == SKIPPED):
                raise ValueError(
                    f"a hidden state must not have an entry {key!r}: the optimizer's state keeps "
                    "something else under this name"
                )
        flat = type(tree) is dict and set(tree) == set(entries)
        kinds = _kinds(entries.values())
        spec = trees.flatten(tree)[1]
        keys = tuple(prefix + k for k in entries)
        nested = None if prefix else _nested(trees.unflatten(spec, keys))
        return cls(keys, spec, flat and not prefix, nested, kinds)

    def read(self, state: Mapping[str, Any]) -> Tree:
        """The hidden state out of a parameter's dict."""
        if self.flat:
            return {k: state[k] for k in self.keys}
        if self.nested is not None:
            return _read(self.nested, state)
        return trees.unflatten(self.spec, [state[k] for k in self.keys])

    def entries(self, tree: Tree) -> dict[str, Any]:
        """The entries for a parameter's dict."""
        if self.flat:
            return tree
        if self.nested is not None:
            found: dict[str, Any] = {}
            _write(self.nested, tree, found)
            return found
        return dict(zip(self.keys, trees.leaves(tree), strict=True))

    def held_by(self, state: Mapping[str, Any] | None) -> bool:
        """Whether a parameter's dict holds this state."""
        return not self.keys or (state is not None and self.keys[0] in state)


def _nested(paths: Tree) -> dict[str, Any] | None:
    """The paths, if they stand in plain dicts only."""
    if type(paths) is not dict:
        return None
    below = [_nested(x) for x in paths.values() if not isinstance(x, str)]
    return None if None in below else paths


def _read(nested: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: state[x] if type(x) is str else _read(x, state) for k, x in nested.items()}


def _write(nested: dict[str, Any], tree: Tree, found: dict[str, Any]) -> None:
    for k, x in nested.items():
        if type(x) is str:
            found[x] = tree[k]
        else:
            _write(x, tree[k], found)


def started(optimizer: Optimizer, opt_params: Tree, params: Tree, num_steps: Any) -> Hidden:
    """The rule's first hidden state; it must be one that can be split by parameter.

    Raises:
        TypeError: for a hidden state that is no `Hidden`.
    """
    start = _sharded.init_hidden if _sharded.is_sharded(params) else _plain
    hidden = start(optimizer, opt_params, params, num_steps=num_steps)
    if not isinstance(hidden, Hidden):
        raise TypeError(
            f"the hidden state of this optimizer is a {type(hidden).__name__}, which cannot be "
            "kept parameter by parameter: let its init_hidden return "
            "fmeta.optimizer.Hidden(leaves, shared)"
        )
    return hidden


def slots_of(
    optimizer: Optimizer, opt_params: Tree, params: Tree, num_steps: Any
) -> tuple[list[Slots], Slots]:
    """What the hidden state of each leaf, and of the whole model, consists of.

    Found on the ``meta`` device, without memory, where the rule can.
    """
    flat, spec = trees.flatten(params)
    try:
        shadows = [
            None if p is None else torch.empty(p.shape, dtype=p.dtype, device="meta") for p in flat
        ]
        weights = trees.map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, opt_params)
        hidden = started(optimizer, weights, trees.unflatten(spec, shadows), num_steps)
    except (NotImplementedError, RuntimeError):
        hidden = started(optimizer, opt_params, params, num_steps)
    trees.flatten_up_to(spec, hidden.leaves, params, "the hidden state")
    keys = params if isinstance(params, dict) else range(len(params))  # in the order of torch
    made: dict[Any, Slots] = {}  # most leaves are alike

    def of(state: Tree) -> Slots:
        entries, structure = trees.flatten(state)
        key = structure, tuple(state), _kinds(entries)  # dicts of another order are equal
        if key not in made:
            made[key] = Slots.of(state)
        return made[key]

    return [of(hidden.leaves[k]) for k in keys], Slots.of(hidden.shared, SHARED)


def _kinds(entries: Iterable[Any]) -> tuple[Any, ...]:
    """Shape and dtype of each, None of what is no tensor."""
    return tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else None for x in entries)


def _plain(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    return optimizer.init_hidden(*args, **kwargs)
