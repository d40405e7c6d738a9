"""Optimizers made of optimizers: all act on `update`, all return an ordinary `Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._lift import per_leaf
from fmeta.optimizer import Hidden, Optimizer, check_num_steps, check_params
from fmeta.optimizers._common import check_number, check_numbers, nothing_to_learn

__all__ = [
    "Transform",
    "chain",
    "clip_by_global_norm",
    "masked",
    "partition",
    "scheduled",
    "to_transform",
    "with_weight_decay",
]

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
    keys = [str(i) for i in range(len(optimizers))]
    needs = frozenset().union(*(o.needs for o in optimizers))

    def init(generator: torch.Generator | None = None) -> Tree:
        return tuple(o.init(generator) for o in optimizers)

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        parts = {
            k: _start(o, th, model_params, num_steps)
            for k, o, th in zip(keys, optimizers, opt_params, strict=True)
        }
        return _merged(model_params, parts)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        delta, parts = grads, {}
        for k, o, th in zip(keys, optimizers, opt_params, strict=True):
            own = _part(model_params, hidden, k)
            delta, parts[k] = o.update(th, model_params, delta, own, **extra)
        return delta, _merged(model_params, parts)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        own = _part(model_params, hidden, keys[-1])
        return optimizers[-1].eval_params(opt_params[-1], model_params, own)

    return Optimizer(init, init_hidden, update, needs, eval_params)


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
    if not optimizers:
        raise ValueError("partition needs at least one optimizer")
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
        return {k: o.init(generator) for k, o in optimizers.items()}

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_params(model_params)
        where = labels(model_params)
        spec = trees.flatten(model_params)[1]
        leaves: list[Any] = [{}] * len(where)
        shared = {}
        for k, o in optimizers.items():
            own = _start(o, opt_params[k], _only(model_params, where, k), num_steps)
            found = trees.flatten_up_to(spec, own.leaves, model_params, "the hidden state")
            leaves = [f if w == k else x for x, f, w in zip(leaves, found, where, strict=True)]
            shared[k] = own.shared
        return Hidden(trees.unflatten(spec, leaves), shared)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        where = labels(model_params)
        trees.match(model_params, grads, "the gradient")
        spec = trees.flatten(model_params)[1]
        states = trees.flatten_up_to(spec, hidden.leaves, model_params, "the hidden state")
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
                opt_params[k], _only(model_params, where, k), _only(grads, where, k), own, **extra
            )
            found = trees.flatten_up_to(spec, new.leaves, model_params, "the hidden state")
            changes = trees.leaves(change)
            for i, w in enumerate(where):
                if w == k:
                    delta[i], states[i] = changes[i], found[i]
            shared[k] = new.shared
        return trees.unflatten(spec, delta), Hidden(trees.unflatten(spec, states), shared)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        where = labels(model_params)
        flat, spec = trees.flatten(model_params)
        states = trees.flatten_up_to(spec, hidden.leaves, model_params, "the hidden state")
        for k, o in optimizers.items():
            own = Hidden(
                trees.unflatten(
                    spec, [s if w == k else {} for s, w in zip(states, where, strict=True)]
                ),
                hidden.shared[k],
            )
            shown = trees.leaves(o.eval_params(opt_params[k], _only(model_params, where, k), own))
            flat = [s if w == k else x for x, s, w in zip(flat, shown, where, strict=True)]
        return trees.unflatten(spec, flat)

    return Optimizer(init, init_hidden, update, needs, eval_params)


def masked(optimizer: Optimizer, mask: Tree | Callable[[str, Tensor], bool]) -> Optimizer:
    """Updates only the chosen parameters; the others stay as they are, without hidden state.

    Args:
        optimizer: any `Optimizer`.
        mask: a tree of bools shaped like the parameters, or ``mask(path, tensor) -> bool``.

    Returns:
        An `Optimizer` with the same ``opt_params``; its delta is ``None`` at the other leaves.
    """

    def chosen(model_params: Tree) -> list[Any]:
        flat, spec = trees.flatten(model_params)
        if callable(mask):
            names = trees.paths(model_params)
            return [p is not None and bool(mask(n, p)) for n, p in zip(names, flat, strict=True)]
        return [bool(m) for m in trees.flatten_up_to(spec, mask, model_params, "the mask")]

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        own = _only(model_params, chosen(model_params), True)
        return _start(optimizer, opt_params, own, num_steps)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        where = chosen(model_params)
        trees.match(model_params, grads, "the gradient")
        return optimizer.update(
            opt_params, _only(model_params, where, True), _only(grads, where, True), hidden, **extra
        )

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        where = chosen(model_params)
        own = _only(model_params, where, True)
        flat, spec = trees.flatten(model_params)
        shown = trees.leaves(optimizer.eval_params(opt_params, own, hidden))
        return trees.unflatten(
            spec, [s if w else x for x, s, w in zip(flat, shown, where, strict=True)]
        )

    return Optimizer(optimizer.init, init_hidden, update, optimizer.needs, eval_params)


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
        own = _start(optimizer, opt_params, model_params, num_steps)
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
        dtype = _dtype_of(delta)
        t, horizon = hidden.shared["t"], hidden.shared.get("num_steps")
        factor = schedule(t.to(dtype), None if horizon is None else horizon.to(dtype))
        delta = trees.map(lambda d: None if d is None else d * factor, delta)
        return delta, Hidden(own.leaves, {**hidden.shared, "t": t + 1, "inner": own.shared})

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        own = Hidden(hidden.leaves, hidden.shared["inner"])
        return optimizer.eval_params(opt_params, model_params, own)

    return Optimizer(optimizer.init, init_hidden, update, optimizer.needs, eval_params)


def with_weight_decay(optimizer: Optimizer, rate: Any) -> Optimizer:
    """Decoupled weight decay: ``delta - rate * p`` (not times a learning rate).

    Args:
        optimizer: any `Optimizer`.
        rate: a number, a scalar tensor, or a tree of them shaped like the parameters.

    Returns:
        An `Optimizer` with the same ``opt_params`` and hidden state.
    """
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

    return optimizer._replace(update=update)


def clip_by_global_norm(max_norm: Any) -> Optimizer:
    """A transform for `chain`: scales all gradients down when their joint norm is too large.

    ``g * min(1, max_norm / ||g||)`` with the norm over all leaves that have a gradient.

    Args:
        max_norm: positive number or scalar tensor.

    Reference:
        Pascanu et al. 1211.5063, section 3.2.
    """
    check_number("max_norm", max_norm, positive=True)

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_params(model_params)
        return Hidden(trees.map(lambda p: {}, model_params), {})

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        found = trees.match(model_params, grads, "the gradient")
        spec = trees.flatten(model_params)[1]
        g = [None if x is None else x.to(trees.compute_dtype(x)) for x in found]
        squares = [x.square().sum() for x in g if x is not None]
        if not squares:
            return grads, hidden
        total = torch.stack([x.to(squares[0].dtype) for x in squares]).sum()
        # Where the norm is below the limit the factor is exactly 1 and its derivative 0; the inner
        # `where` keeps the derivative of the root finite for zero gradients.
        above = total > max_norm**2
        factor = torch.where(above, max_norm / torch.where(above, total, 1.0).sqrt(), 1.0)
        return trees.unflatten(
            spec, [None if x is None else x * factor.to(x.dtype) for x in g]
        ), hidden

    return Optimizer(nothing_to_learn, init_hidden, update)


class Transform(NamedTuple):
    """An optimizer in the shape of optax: ``init(params)``, ``update(grads, state, params)``."""

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]


def to_transform(optimizer: Optimizer, opt_params: Tree) -> Transform:
    """An optimizer with its learned parameters bound, with the signature of optax.

    Returns:
        A `Transform`: ``init(params, *, num_steps=None) -> state`` and
        ``update(grads, state, params, *, loss=None, extras=None) -> (updates, state)``, in which
        ``updates`` is to be added to the parameters.
    """

    def init(params: Tree, *, num_steps: Any = None) -> Tree:
        return optimizer.init_hidden(opt_params, params, num_steps=num_steps)

    def update(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        return optimizer.update(opt_params, params, grads, state, **extra)

    return Transform(init, update)


def _start(optimizer: Optimizer, opt_params: Tree, model_params: Tree, num_steps: Any) -> Hidden:
    """The hidden state of a part; it must be one that can be split by parameter."""
    check_num_steps(optimizer.needs, num_steps)
    hidden = optimizer.init_hidden(opt_params, model_params, num_steps=num_steps)
    if not isinstance(hidden, Hidden):
        raise ValueError(
            f"a combined optimizer's hidden state is a {type(hidden).__name__}, which cannot be "
            "split by parameter: let init_hidden return fmeta.optimizer.Hidden(leaves, shared)"
        )
    return hidden


def _only(tree: Tree, where: list[Any], key: Any) -> Tree:
    flat, spec = trees.flatten(tree)
    return trees.unflatten(
        spec, [x if w == key else None for x, w in zip(flat, where, strict=True)]
    )


def _merged(model_params: Tree, parts: dict[str, Hidden]) -> Hidden:
    spec = trees.flatten(model_params)[1]
    columns = [
        trees.flatten_up_to(spec, part.leaves, model_params, "the hidden state")
        for part in parts.values()
    ]
    leaves = [dict(zip(parts, row, strict=True)) for row in zip(*columns, strict=True)]
    return Hidden(trees.unflatten(spec, leaves), {k: part.shared for k, part in parts.items()})


def _part(model_params: Tree, hidden: Hidden, key: str) -> Hidden:
    spec = trees.flatten(model_params)[1]
    leaves = trees.flatten_up_to(spec, hidden.leaves, model_params, "the hidden state")
    return Hidden(trees.unflatten(spec, [x[key] for x in leaves]), hidden.shared[key])


def _dtype_of(delta: Tree) -> torch.dtype:
    dtype = torch.float32
    for d in trees.leaves(delta):
        if d is not None:
            dtype = torch.promote_types(dtype, d.dtype)
    return dtype
