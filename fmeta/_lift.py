"""Lifts a rule of one tensor to a whole parameter tree, batched over leaves of one shape.

`fmeta._leaves` matches the leaves of one update; here they are grouped. Small leaves of one shape
and dtype are stacked and updated at once; a large leaf, or one that is alone with its shape, is
updated as it is, without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import consuming, leafwise
from fmeta._leaves import RULE_ERRORS, Leaves, per_leaf, start_leaves
from fmeta.optimizer import Hidden, Optimizer, check_needs, check_num_steps

__all__ = ["lift"]

Tree = Any

# Measured on a CPU (adam, with and without a gradient): 2 stacked leaves cost what 2 single ones
# do, 4 cost two thirds, 16 a third; above 2**13 elements the copies cost more than the calls saved.
# A stack stays in the cache from one operation to the next.
_STACKED = {"max_numel": 2**13, "min_size": 4, "total": 2**16}
_ALONE = {"max_numel": -1, "min_size": 1, "total": 1}
# A rule of many operations that takes stacks as they are (tile by tile) gains with any two leaves
# whose operations are too short.
_BATCHED = {"max_numel": 2**15, "min_size": 2, "total": 2**17}


def lift(
    init: Callable[..., Tree],
    init_leaf: Callable[..., dict[str, Any]],
    update_leaf: Callable[..., tuple[Tensor, dict[str, Any]]],
    *,
    hypers: Callable[[Tree], Mapping[str, Any]] | None = None,
    prepare: Callable[[Tree], Any] | None = None,
    elementwise: bool = False,
    batched: bool = False,
    owning: bool = False,
    stacked: bool = True,
    needs: frozenset[str] = frozenset(),
    leaf_keywords: tuple[str, ...] = (),
) -> Optimizer:
    """An `Optimizer` from a rule of one tensor.

    Args:
        init: ``init(generator=None) -> opt_params``.
        init_leaf: ``(opt_params, param[, num_steps=]) -> dict``, the state of one leaf.
        update_leaf: ``(opt_params, param, grad, state, **hypers[, loss=, extras=]) -> (delta,
            state)``. Under `vmap` over leaves, unless ``elementwise``.
        hypers: ``opt_params -> {name: value}``; a value is a number, a scalar tensor, or a tree
            shaped like the parameters, of which a rule gets its own leaf's.
        prepare: makes of ``opt_params`` (in the compute dtype) what ``update_leaf`` gets in their
            place: what is the same for all leaves is then computed once a step.
        elementwise: the rule works element by element and by broadcasting only, so a stack of
            leaves needs no vmap.
        batched: the rule takes a stack of leaves with ``batch=1``, the number of leading axes, and
            scalars of the state as ``(leaves, 1, ...)``: no vmap either.
        owning: the rule takes ``own=True``: then the state is nobody else's, and its memory may
            hold the new one.
        stacked: whether to stack leaves at all; a rule of one or two operations is cheaper without.
        needs: as in `Optimizer`.
        leaf_keywords: which of ``num_steps``, ``loss``, ``extras`` the leaf functions take.
    """
    update_keywords = tuple(k for k in leaf_keywords if k != "num_steps")

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_num_steps(needs, num_steps)
        extra = {"num_steps": num_steps} if "num_steps" in leaf_keywords else {}
        return Hidden(
            start_leaves(lambda th, p: init_leaf(th, p, **extra), opt_params, model_params), {}
        )

    limits = _BATCHED if batched else _STACKED if stacked else _ALONE

    def advance(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Hidden,
        *,
        loss: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
        own: bool = False,
    ) -> tuple[Tree, Hidden]:
        check_needs(needs, loss, extras)
        at = Leaves(model_params, grads, hidden)
        if elementwise:
            at.check_shapes()
        consumed = {"own": True} if own else {}
        given = {"loss": loss, "extras": extras}
        extra = {k: given[k] for k in update_keywords}
        common, named = {}, {}
        for name, value in (hypers(opt_params) if hypers else {}).items():
            if isinstance(value, (int, float)):
                common[name] = value  # the same for all leaves, of any dtype
            else:
                named[name] = per_leaf(value, model_params, at.spec, name, like_params=elementwise)
        delta: list[Any] = [None] * len(at.params)
        states = list(at.states)
        weights: dict[torch.dtype, Tree] = {}
        prepared: dict[torch.dtype, Any] = {}
        members = set(at.active)
        candidates = [p if i in members else None for i, p in enumerate(at.params)]
        for group in trees.shape_classes(candidates, **limits):
            dtype = trees.compute_dtype(at.params[group[0]])
            if dtype not in weights:
                weights[dtype] = at.weights(opt_params, dtype)
            rows = [
                (
                    *at.pair(i),
                    at.states[i],
                    {k: _number(v[i], at.params[i]) for k, v in named.items()} if named else {},
                )
                for i in group
            ]
            try:
                if dtype not in prepared:
                    prepared[dtype] = prepare(weights[dtype]) if prepare else weights[dtype]
                theta = prepared[dtype]
                if len(group) == 1:
                    p, g, s, h = rows[0]
                    results = [update_leaf(theta, p, g, s, **common, **h, **extra, **consumed)]
                elif elementwise or batched:
                    kind = {"batch": 1, **consumed} if batched else {}
                    more = {**common, **extra, **kind}
                    results = _broadcast_group(update_leaf, theta, rows, more)
                else:
                    results = _vmap_group(update_leaf, theta, rows, {**common, **extra})
            except RULE_ERRORS as error:
                first = at.pair(group[0])[0]
                started = functools.partial(_started, init_leaf, weights[dtype], first)
                better = at.explained(error, init, opt_params, started)
                if better is error:
                    raise
                raise better from error
            for i, (d, s) in zip(group, results, strict=True):
                delta[i], states[i] = d, s
        return at.tree(delta), Hidden(at.tree(states), hidden.shared)

    @leafwise
    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **given: Any
    ) -> tuple[Tree, Hidden]:
        return advance(opt_params, model_params, grads, hidden, **given)

    if owning:
        consuming(update, functools.partial(advance, own=True))
    return Optimizer(init, init_hidden, update, needs)


def _started(init_leaf: Callable[..., Any], theta: Tree, param: Tensor) -> Mapping[str, Any]:
    try:
        state = init_leaf(theta, param)
    except Exception:  # it needs what is not at hand here: then nothing can be said
        return {}
    return state if isinstance(state, dict) else {}


def _number(value: Any, like: Tensor) -> Any:
    """A hyper-parameter in the compute dtype of ``like``, on its device."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, trees.compute_dtype(like))


def _broadcast_group(
    update_leaf: Callable[..., Any], theta: Tree, rows: list[Any], extra: dict[str, Any]
) -> list[Any]:
    ndim = rows[0][0].ndim
    ones = (1,) * ndim

    def stack(xs: Sequence[Any]) -> Any:
        if all(x is xs[0] for x in xs) and not (isinstance(xs[0], Tensor) and xs[0].ndim):
            return xs[0]  # one number for all leaves
        out = _stack_numbers(xs, rows[0][0])
        return out.reshape(-1, *ones) if out.ndim == 1 else out

    ps, gs, states, hypers = zip(*rows, strict=True)
    given, kept = {}, set()
    for k in states[0]:
        xs = [s[k] for s in states]
        column = _as_one(xs) if extra.get("own") else None
        if column is not None:
            kept.add(k)
        column = torch.stack(xs) if column is None else column
        given[k] = column.reshape(-1, *ones) if column.ndim == 1 else column
    scalars = {k for k in given if not states[0][k].ndim}
    delta, state = update_leaf(
        theta,
        torch.stack(ps),
        torch.stack(gs),
        dict(given),
        **{k: stack([h[k] for h in hypers]) for k in hypers[0]},
        **extra,
    )
    for k in kept & state.keys():  # the leaves' own tensors hold the new state
        if state[k] is not given[k]:
            given[k].copy_(state[k])
    if kept == state.keys() == states[0].keys():
        return list(zip(delta.unbind(0), states, strict=True))
    fresh = {k: v for k, v in state.items() if k not in kept}
    rows_out = {k: (v.reshape(-1) if k in scalars else v).unbind(0) for k, v in fresh.items()}
    return [
        (d, {k: rows_out[k][i] if k in fresh else states[i][k] for k in state})
        for i, d in enumerate(delta.unbind(0))
    ]


def _as_one(xs: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one, stacked, if they lie one after another in one memory; or None.

    So they do once a stack's new state was handed out leaf by leaf.
    """
    first = xs[0]
    size = first.numel() * first.element_size()
    if torch.compiler.is_compiling() or not size or first.device.type == "meta":
        return None
    start, memory = first.data_ptr(), first.untyped_storage()
    ends = range(start, start + len(xs) * size + 1, size)
    if ends[-1] > memory.data_ptr() + memory.nbytes():
        return None
    # Without loops of Python: this is asked for every tensor of the state, at every step.
    if list(map(Tensor.data_ptr, xs)) != list(ends[:-1]):
        return None
    if not all(map(Tensor.is_contiguous, xs)):
        return None
    return first.as_strided((len(xs), *first.shape), (first.numel(), *first.stride()))


def _stack_numbers(values: Sequence[Any], param: Tensor) -> Tensor:
    """One hyper-parameter of several leaves; where some are scalars, they are spread out."""
    tensors = [x if isinstance(x, Tensor) else param.new_tensor(x) for x in values]
    if any(x.shape != tensors[0].shape for x in tensors):
        tensors = [x.expand(param.shape) for x in tensors]
    return torch.stack(tensors)


def _vmap_group(
    update_leaf: Callable[..., Any], theta: Tree, rows: list[Any], extra: dict[str, Any]
) -> list[Any]:
    ps, gs, states, hypers = zip(*rows, strict=True)
    shared = {k: hypers[0][k] for k in hypers[0] if all(h[k] is hypers[0][k] for h in hypers)}
    own = {k: _stack_numbers([h[k] for h in hypers], ps[0]) for k in hypers[0] if k not in shared}
    columns = [trees.leaves(s) for s in states]
    spec = trees.flatten(states[0])[1]
    stacked = [torch.stack(c) for c in zip(*columns, strict=True)]
    found: list[Any] = []

    def one(p: Tensor, g: Tensor, state: list[Tensor], own: dict[str, Tensor]) -> Any:
        delta, new = update_leaf(
            theta, p, g, trees.unflatten(spec, state), **shared, **own, **extra
        )
        leaves, new_spec = trees.flatten(new)
        found.append(new_spec)
        return delta, tuple(leaves)

    delta, flat = torch.vmap(one)(torch.stack(ps), torch.stack(gs), stacked, own)
    parts = [x.unbind(0) for x in flat]
    return [
        (d, trees.unflatten(found[0], [x[i] for x in parts])) for i, d in enumerate(delta.unbind(0))
    ]
