"""`partition` and `masked`: different parameters, different optimizers (or none)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta import random, trees
from fmeta._leafwise import applied_as_is
from fmeta.combinators._parts import check_entries, only, start_some, states_of
from fmeta.optimizer import Hidden, Optimizer, check_optimizer_type, check_params

__all__ = ["masked", "partition"]

Tree = Any


def partition(
    optimizers: Mapping[str, Optimizer], label_of: Callable[[str, Tensor], str]
) -> Optimizer:
    """Each parameter goes to one of several optimizers.

    To each optimizer the leaves of the others are ``None``, so its hidden state holds nothing for
    them.

    Args:
        optimizers: optimizer of each label.
        label_of: ``label_of(path, tensor) -> label``, with a path such as ``encoder/0.weight``; it
            may look at the tensor's shape and dtype, not at its values.

    Returns:
        An `Optimizer` whose ``opt_params`` are a dict by label.

    Raises:
        ValueError: (in `init_hidden` and `update`) for a label without optimizer, with the path.
    """
    if not isinstance(optimizers, Mapping):
        raise TypeError(
            f"partition takes a dict of optimizers by label, got a {type(optimizers).__name__}"
        )
    if not optimizers:
        raise ValueError("partition needs at least one optimizer")
    for label, o in optimizers.items():
        check_optimizer_type(o, f"the optimizer of label {label!r}")
    needs = frozenset().union(*(o.needs for o in optimizers.values()))

    def labels(model_params: Tree) -> list[str | None]:
        found: list[str | None] = []
        names, flat = trees.paths(model_params), trees.leaves(model_params)
        for path, p in zip(names, flat, strict=True):
            label = None if p is None else label_of(path, p)
            if label is not None and label not in optimizers:
                raise ValueError(
                    f"label_of gave {label!r} for path {path}, but there are optimizers for "
                    f"{', '.join(map(repr, optimizers))} only"
                )
            found.append(label)
        return found

    def init(generator: torch.Generator | None = None) -> Tree:
        generator = random.own(generator)  # one for all: equal parts start unequal
        return {k: o.init(generator) for k, o in optimizers.items()}

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_params(model_params)
        check_entries(opt_params, optimizers, "opt_params of a partition")
        where = labels(model_params)
        spec = trees.flatten(model_params)[1]
        leaves: list[Any] = [{}] * len(where)
        shared = {}
        for k, o in optimizers.items():
            own = start_some(o, opt_params[k], model_params, where, k, num_steps)
            found = states_of(model_params, own)
            leaves = [f if w == k else x for x, f, w in zip(leaves, found, where, strict=True)]
            shared[k] = own.shared
        return Hidden(trees.unflatten(spec, leaves), shared)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        where = labels(model_params)
        check_entries(opt_params, optimizers, "opt_params of a partition")
        check_entries(hidden.shared, optimizers, "the shared hidden state of a partition")
        trees.match(model_params, grads, "the gradient")
        spec = trees.flatten(model_params)[1]
        states = states_of(model_params, hidden)
        delta: list[Any] = [None] * len(where)
        shared = {}
        for k, o in optimizers.items():
            own = Hidden(
                trees.unflatten(
                    spec, [s if w == k else {} for s, w in zip(states, where, strict=True)]
                ),
                hidden.shared[k],
            )
            change, new = o.update(
                opt_params[k], only(model_params, where, k), only(grads, where, k), own, **extra
            )
            found = states_of(model_params, new)
            changes = trees.leaves(change)
            for i, w in enumerate(where):
                if w == k:
                    delta[i], states[i] = changes[i], found[i]
            shared[k] = new.shared
        return trees.unflatten(spec, delta), Hidden(trees.unflatten(spec, states), shared)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        where = labels(model_params)
        flat, spec = trees.flatten(model_params)
        states = states_of(model_params, hidden)
        for k, o in optimizers.items():
            own = Hidden(
                trees.unflatten(
                    spec, [s if w == k else {} for s, w in zip(states, where, strict=True)]
                ),
                hidden.shared[k],
            )
            shown = trees.leaves(o.eval_params(opt_params[k], only(model_params, where, k), own))
            flat = [s if w == k else x for x, s, w in zip(flat, shown, where, strict=True)]
        return trees.unflatten(spec, flat)

    applied_as_is(update, *optimizers.values())
    return Optimizer(init, init_hidden, update, needs, eval_params)


def masked(optimizer: Optimizer, mask: Tree | Callable[[str, Tensor], bool]) -> Optimizer:
    """Updates only the chosen parameters; the others stay as they are, without hidden state.

    Args:
        optimizer: any `Optimizer`.
        mask: a tree of bools shaped like the parameters, or ``mask(path, tensor) -> bool``.

    Returns:
        An `Optimizer` with the same ``opt_params``; its delta is ``None`` at the other leaves.
    """

    check_optimizer_type(optimizer, "optimizer")

    def chosen(model_params: Tree) -> list[Any]:
        flat, spec = trees.flatten(model_params)
        if callable(mask):
            names = trees.paths(model_params)
            return [p is not None and bool(mask(n, p)) for n, p in zip(names, flat, strict=True)]
        return [bool(m) for m in trees.flatten_up_to(spec, mask, model_params, "the mask")]

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        where = chosen(model_params)
        return start_some(optimizer, opt_params, model_params, where, True, num_steps)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        where = chosen(model_params)
        trees.match(model_params, grads, "the gradient")
        return optimizer.update(
            opt_params, only(model_params, where, True), only(grads, where, True), hidden, **extra
        )

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        where = chosen(model_params)
        own = only(model_params, where, True)
        flat, spec = trees.flatten(model_params)
        shown = trees.leaves(optimizer.eval_params(opt_params, own, hidden))
        return trees.unflatten(
            spec, [s if w else x for x, s, w in zip(flat, shown, where, strict=True)]
        )

    applied_as_is(update, optimizer)
    return Optimizer(optimizer.init, init_hidden, update, optimizer.needs, eval_params)
