"""A rule of one tensor, run over the leaves of an update group by group.

`fmeta._leaves` matches the leaves of one update; here they are grouped. Small leaves of one shape
and dtype are stacked and updated at once (`fmeta._stacks`); a large leaf, or one that is alone with
its shape, is updated as it is, without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leaves import RULE_ERRORS, Leaves, per_leaf
from fmeta._stacks import Columns, Rows, Stack, broadcast, under_vmap

__all__ = ["ALONE", "BATCHED", "LARGE", "STACKED", "TILES", "Done", "LeafRule"]

Tree = Any

# Measured on a CPU (adam, with and without a gradient): 2 stacked leaves cost what 2 single ones
# do, 4 cost two thirds, 16 a third; above 2**13 elements the copies cost more than the calls saved.
# A stack stays in the cache from one operation to the next.
STACKED = {"max_numel": 2**13, "min_size": 4, "total": 2**16}
ALONE = {"max_numel": -1, "min_size": 1, "total": 1}
# A rule of many operations that takes stacks as they are (tile by tile) gains with any two leaves
# whose operations are too short.
BATCHED = {"max_numel": 2**15, "min_size": 2, "total": 2**17}
# A rule that is one or two calls of compiled loops, which cost a tenth of a millisecond each; or a
# hundred small calls a tile, without derivatives (adafactor_mlp on transformers of 1M: a tenth).
LARGE = {"max_numel": 2**17, "min_size": 2, "total": 2**19}
# One whose features of a stack are kept only while they fit into one tile (velo).
TILES = {"max_numel": 2**15, "min_size": 2, "total": 2**16}


class Done(NamedTuple):
    """A group of leaves after its update.

    Attributes:
        group: indices of the leaves.
        delta: ``(B, *leaf)``; of one leaf ``(*leaf)``.
        states: dict of each leaf.
    """

    group: list[int]
    delta: Tensor
    states: Sequence[Any]

    def deltas(self) -> Sequence[Tensor]:
        """Of each leaf."""
        return (self.delta,) if len(self.group) == 1 else self.delta.unbind(0)


class LeafRule(NamedTuple):
    """A rule of one tensor; see `fmeta._lift.lift`.

    Attributes:
        init, init_leaf, update_leaf, prepare: as there.
        limits: which leaves are stacked.
        stacks: whether ``update_leaf`` takes stacks; else it runs under `vmap`.
        keyword: what tells it so.
        elementwise: whether all of its state has the parameter's shape, or none.
        owning: whether it takes ``own=True``.
        skip: an entry of the state that it does not see.
    """

    init: Callable[..., Tree]
    init_leaf: Callable[..., Any]
    update_leaf: Callable[..., Any]
    prepare: Callable[[Tree], Any] | None = None
    limits: Mapping[str, int] = STACKED
    stacks: bool = False
    keyword: Mapping[str, int] = {}
    elementwise: bool = False
    owning: bool = False
    skip: str | None = None

    def run(
        self,
        at: Leaves,
        opt_params: Tree,
        hypers: Mapping[str, Any],
        extra: Mapping[str, Any],
        *,
        rows: Mapping[str, Rows] | None = None,
        own: bool = False,
        memo: dict[int, Any] | None = None,
    ) -> Iterator[Done]:
        """One group of active leaves after the other.

        Args:
            at: the leaves, whose states have not been looked at.
            opt_params: weights.
            hypers: name -> number, scalar tensor, or a tree shaped like the parameters.
            extra: keywords of ``update_leaf`` that are the same for all leaves.
            rows: keywords that are a row for each leaf.
            own: whether the memory of the states may hold the new ones.
            memo: keeps the stacks of states in their own memory for another pass over the same
                leaves and states; empty at first.
        """
        numbers = _Hypers(hypers, at, self.elementwise)
        extra = {**extra, "own": True} if own and self.owning else extra
        weights: dict[torch.dtype, Tree] = {}
        prepared: dict[torch.dtype, Any] = {}
        for group in at.groups(self.limits):
            dtype = trees.compute_dtype(at.params[group[0]])
            if dtype not in weights:
                weights[dtype] = at.weights(opt_params, dtype)
            try:
                if dtype not in prepared:
                    own_form = self.prepare
                    prepared[dtype] = own_form(weights[dtype]) if own_form else weights[dtype]
                common = prepared[dtype], at, group, dtype, numbers, extra, rows or {}
                if len(group) == 1:
                    delta, states = self._alone(*common)
                else:
                    delta, states = self._stacked(*common, own, memo)
            except RULE_ERRORS as error:
                at.check_states(group, shapes=self.elementwise)
                first = at.pair(group[0])[0]
                started = functools.partial(_started, self.init_leaf, weights[dtype], first)
                better = at.explained(error, self.init, opt_params, started)
                if better is error and not isinstance(error, torch.OutOfMemoryError):
                    better = at.unfit(group, started()) or error
                if better is error:
                    raise
                raise better from error
            yield Done(group, delta, states)
            del delta, states  # the memory is free for the next group

    def _alone(
        self,
        theta: Tree,
        at: Leaves,
        group: list[int],
        dtype: torch.dtype,
        numbers: _Hypers,
        extra: Mapping[str, Any],
        rows: Mapping[str, Rows],
    ) -> tuple[Tensor, Sequence[Any]]:
        (i,) = group
        at.check_states(group, shapes=self.elementwise)
        p, g = at.pair(i)
        state, device = at.states[i], p.device
        if self.skip is not None:
            state = {k: x for k, x in state.items() if k != self.skip}
        named = {k: xs[0] for k, xs in numbers.of(group, dtype, device).items()}
        told = {k: x.row(i).to(device, dtype) for k, x in rows.items()}
        common = numbers.common(dtype, device)
        delta, new = self.update_leaf(theta, p, g, state, **common, **named, **told, **extra)
        return delta, (new,)

    def _stacked(
        self,
        theta: Tree,
        at: Leaves,
        group: list[int],
        dtype: torch.dtype,
        numbers: _Hypers,
        extra: Mapping[str, Any],
        rows: Mapping[str, Rows],
        own: bool,
        memo: dict[int, Any] | None,
    ) -> tuple[Tensor, Sequence[Any]]:
        states = [at.states[i] for i in group]
        keys = [k for k in states[0] if k != self.skip]
        if memo and group[0] in memo:
            params, grads, columns = memo[group[0]]
        else:
            params = _stack([at.params[i] for i in group], dtype)
            grads = _stack([at.grads[i] for i in group], dtype)
            columns = Columns(states, keys, own, params.ndim - 1) if self.stacks else None
            if memo is not None and columns is not None and columns.in_place:
                memo[group[0]] = params, grads, columns
        device = params.device
        hypers = numbers.of(group, dtype, device)
        told = {k: y.of(group).to(device, dtype) for k, y in rows.items()}
        x = Stack(params, grads, states, keys, hypers, told)
        extra = {**numbers.common(dtype, device), **extra}
        if columns is None:
            return under_vmap(self.update_leaf, theta, x, extra)
        check = functools.partial(at.check_column, group, params, shapes=self.elementwise)
        return broadcast(self.update_leaf, theta, x, columns, {**extra, **self.keyword}, check)


class _Hypers:
    """Hyper-parameters of one update, by name."""

    def __init__(self, values: Mapping[str, Any], at: Leaves, like_params: bool) -> None:
        self.same: dict[str, Any] = {}
        self.by_leaf: dict[str, list[Any]] = {}
        self._cast: dict[torch.dtype, dict[str, Any]] = {}
        for name, value in values.items():
            scalar = isinstance(value, Tensor) and not value.ndim
            if scalar or isinstance(value, (int, float)):
                self.same[name] = value
            else:
                self.by_leaf[name] = per_leaf(
                    value, at.model_params, at.spec, name, like_params=like_params
                )

    def common(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Those that are one number for all leaves."""
        if dtype not in self._cast:
            self._cast[dtype] = {k: _number(x, device, dtype) for k, x in self.same.items()}
        return self._cast[dtype]

    def of(
        self, group: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> dict[str, list[Any]]:
        """The others, of the leaves of a group."""
        return {k: [_number(xs[i], device, dtype) for i in group] for k, xs in self.by_leaf.items()}


def _number(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    return value.to(device, dtype) if isinstance(value, Tensor) else value


def _stack(xs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    kinds = {x.dtype for x in xs}
    if len(kinds) > 1:
        return torch.stack([x.to(dtype) for x in xs])
    return torch.stack(list(xs)).to(dtype)


def _started(init_leaf: Callable[..., Any], theta: Tree, param: Tensor) -> Mapping[str, Any]:
    try:
        state = init_leaf(theta, param)
    except Exception:  # it needs what is not at hand here: then nothing can be said
        return {}
    return state if isinstance(state, dict) else {}
