"""Lifts a rule of one tensor to a whole parameter tree, batched over leaves of one shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fmeta._chunks import binned, chunkable, chunks_of_elements
from fmeta._groups import ALONE, BATCHED, LARGE, STACKED, LeafRule
from fmeta._leafwise import consuming, leafwise
from fmeta._leaves import Leaves, start_leaves, told_of_weights
from fmeta.optimizer import Hidden, Optimizer, check_needs, check_num_steps

__all__ = ["lift"]

Tree = Any


def lift(
    init: Callable[..., Tree],
    init_leaf: Callable[..., dict[str, Any]],
    update_leaf: Callable[..., tuple[Tensor, dict[str, Any]]],
    *,
    hypers: Callable[[Tree], Mapping[str, Any]] | None = None,
    prepare: Callable[[Tree], Any] | None = None,
    elementwise: bool = False,
    batched: bool = False,
    large_stacks: bool = False,
    owning: bool = False,
    stacked: bool = True,
    chunks: Callable[[int], Callable[..., Any]] | None = None,
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
        large_stacks: of a ``batched`` rule whose calls cost much: where the state is nobody else's,
            larger leaves are stacked, too. (With derivatives, what is kept of a large stack would
            leave the cache: measured on `adafactor_mlp`, 1.6 times the time.)
        owning: the rule takes ``own=True``: then the state is nobody else's, and its memory may
            hold the new one.
        stacked: whether to stack leaves at all; a rule of one or two operations is cheaper without.
        chunks: ``chunks(coordinates)`` is ``update_leaf`` with a larger leaf worked off
            in recomputed chunks; by itself where the rule is ``elementwise``.
        needs: as in `Optimizer`.
        leaf_keywords: which of ``num_steps``, ``loss``, ``extras`` the leaf functions take.
    """
    update_keywords = tuple(k for k in leaf_keywords if k != "num_steps")

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_num_steps(needs, num_steps)
        extra = {"num_steps": num_steps} if "num_steps" in leaf_keywords else {}

        def start() -> Tree:
            return start_leaves(lambda th, p: init_leaf(th, p, **extra), opt_params, model_params)

        return Hidden(told_of_weights(init, opt_params, start), {})

    rule = LeafRule(
        init,
        init_leaf,
        update_leaf,
        prepare,
        BATCHED if batched else STACKED if stacked else ALONE,
        stacks=elementwise or batched,
        keyword={"batch": 1} if batched else {},
        elementwise=elementwise,
        owning=owning,
    )

    def advance(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Hidden,
        *,
        loss: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
        own: bool = False,
        then: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None,
        hypers: Any = hypers,
        update_leaf: Callable[..., Any] = update_leaf,
    ) -> tuple[Tree, Hidden]:
        check_needs(needs, loss, extras)
        at = Leaves(model_params, grads, hidden, states_later=True)
        given = {"loss": loss, "extras": extras}
        extra = {k: given[k] for k in update_keywords}
        limits = LARGE if own and large_stacks else rule.limits
        leaf_rule = rule._replace(update_leaf=update_leaf, limits=limits)
        delta: list[Any] = [None] * len(at.params)
        states = list(at.states)
        numbers = told_of_weights(init, opt_params, lambda: _values_of(hypers, opt_params))
        for done in leaf_rule.run(at, opt_params, numbers, extra, own=own):
            changes: Sequence[Any] = done.deltas()
            if then is not None:
                then([at.params[i] for i in done.group], changes)
                changes = [None] * len(changes)
            for i, d, s in zip(done.group, changes, done.states, strict=True):
                delta[i], states[i] = d, s
            del done, changes
        return at.tree(delta), Hidden(at.tree(states), hidden.shared)

    @leafwise
    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **given: Any
    ) -> tuple[Tree, Hidden]:
        return advance(opt_params, model_params, grads, hidden, **given)

    if elementwise and chunks is None:
        chunks = functools.partial(chunks_of_elements, update_leaf)

    def in_chunks(coordinates: int) -> Callable[..., Any]:
        cut: dict[str, Any] = {"update_leaf": chunks(coordinates)} if chunks else {}
        return binned(
            functools.partial(advance, **cut),
            coordinates,
            hypers=hypers,
            needs=needs,
            splits_leaves=bool(chunks),
        )

    chunkable(update, in_chunks)
    if owning or elementwise or batched:
        consuming(update, functools.partial(advance, own=True), hands_on=True)
    return Optimizer(init, init_hidden, update, needs)


def _values_of(hypers: Any, opt_params: Tree) -> Mapping[str, Any]:
    """The hyper-parameters: computed here, or given."""
    return (hypers(opt_params) if callable(hypers) else hypers) or {}
