"""`treewise`: an optimizer whose tensors talk to each other (hierarchical rules)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._groups import TILES, Done, LeafRule
from fmeta._leafwise import consuming
from fmeta._leaves import RULE_ERRORS, Leaves, check_state, start_leaves, told_of_weights
from fmeta._stacks import Columns, Rows, can_index
from fmeta._tensorwise import check_delta, delta_of, fresh, required
from fmeta.optimizer import Hidden, Optimizer, check_needs, check_num_steps

__all__ = ["treewise"]

Tree = Any


def treewise(rule: Any) -> Optimizer:
    """Lifts a rule with a state across tensors: summarise each, mix all, update each.

    With L tensors, one update is ``summary`` for each tensor (batched over tensors of one shape),
    one ``mix`` over the stacked summaries (one matmul for all tensors, not one each), and
    ``update`` for each tensor with what ``mix`` tells it.

    Args:
        rule: an object with

            - ``init(generator) -> opt_params``;
            - ``init_hidden(opt_params, param: (*leaf)) -> dict``, state of the coordinates;
            - ``init_tensor(opt_params, param) -> dict`` of tensors ``(*s)``, state of one tensor
              (an RNN over tensors; optional);
            - ``init_shared(opt_params, model_params[, num_steps=]) -> dict``, state of the whole
              model (optional; gets ``num_steps`` when that is in ``needs``);
            - ``summary(opt_params, param, grad, hidden) -> (S,)``, or ``observe(opt_params, param,
              grad, hidden, shared) -> ((S,), hidden)``, which also sees the state of the whole
              model and may move the tensor's own (its moments, say) before the tensors talk;
            - ``mix(opt_params, summaries: (L, S), tensors: dict of (L, *s), shared[, loss=,
              extras=]) -> (controls: (L, C), tensors, shared)``; L counts the tensors with a
              gradient, in the order of `fmeta.trees.flatten`;
            - ``update(opt_params, param, grad, hidden, control: (C,)) -> (delta, hidden)``, or
              ``step(...) -> (param, hidden)``;
            - ``needs`` (optional): then ``mix`` gets ``loss=`` and ``extras=``;
            - ``batched`` (optional): if true, small leaves of one shape go stacked, with a leading
              axis everywhere, into ``summary(..., batch=1)`` (or ``observe``) and ``update(...,
              batch=1)``, instead of under `vmap`;
            - ``owning`` (optional): if true, ``update`` gets ``own=True`` where the hidden dict is
              nobody else's, and its memory may hold the new one.

    Returns:
        An `Optimizer`; the hidden dict at a leaf is what ``init_hidden`` gives and, under
        ``"tensor"``, what ``init_tensor`` gives.

    Raises:
        TypeError: when the rule lacks a function.

    Example:
        >>> class Share:                                # of the sum of squares of all gradients
        ...     init = staticmethod(lambda generator: {"lr": torch.tensor(1.0)})
        ...     init_hidden = staticmethod(lambda th, p: {})
        ...     summary = staticmethod(lambda th, p, g, h: g.square().sum()[None])
        ...     mix = staticmethod(lambda th, s, hs, shared: (s / (s.sum() + 1e-8), hs, shared))
        ...     update = staticmethod(lambda th, p, g, h, c: (-th["lr"] * c[0] * g, h))
        >>> share = treewise(Share)
        >>> p = [torch.zeros(1), torch.zeros(1)]
        >>> g = [torch.ones(1), 3 * torch.ones(1)]
        >>> share.step(share.init(), p, g, share.init_hidden(share.init(), p))[0]
        [tensor([-0.1000]), tensor([-2.7000])]

    Reference:
        Wichrowska et al. 1703.04813 (hierarchical RNN); Metz et al. 2211.09760 (VeLO).
    """
    init, init_hidden = required(rule, "init"), required(rule, "init_hidden")
    observe, mix = _observing(rule), required(rule, "mix")
    observes = hasattr(rule, "observe")
    change = delta_of(rule)
    init_tensor: Callable[..., Any] = getattr(rule, "init_tensor", lambda th, p: {})
    init_shared: Callable[..., Any] = getattr(rule, "init_shared", lambda th, ps, **extra: {})
    needs = frozenset(getattr(rule, "needs", ()))

    def init_leaf(th: Tree, p: Tensor) -> dict[str, Any]:
        return {**init_hidden(th, p), "tensor": init_tensor(th, p)}

    def observed(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Any], shared: dict[str, Any], **batch: int
    ) -> Any:
        summary, new = observe(th, p, g, h, shared, **batch)
        return summary, check_state(new, "observe")

    def update_leaf(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Any], control: Tensor, **more: Any
    ) -> Any:
        delta, new = change(th, p, g, h, control, **more)
        check_delta(delta, p)
        return delta, new

    def start(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_num_steps(needs, num_steps)
        extra = {"num_steps": num_steps} if "num_steps" in needs else {}

        def fresh_state() -> Hidden:
            leaves = start_leaves(init_leaf, opt_params, model_params)
            return Hidden(leaves, init_shared(opt_params, model_params, **extra))

        started: Hidden = told_of_weights(init, opt_params, fresh_state)
        return started

    # Two passes over the tensors: the "delta" of the first is the summary, the second gets a row of
    # controls for each tensor.
    seeing = LeafRule(init, init_hidden, observed, skip="tensor")
    moving = LeafRule(init, init_hidden, update_leaf, skip="tensor")
    if getattr(rule, "batched", False):
        seeing, moving = (
            x._replace(limits=TILES, stacks=True, keyword={"batch": 1}) for x in (seeing, moving)
        )
    moving = moving._replace(owning=getattr(rule, "owning", False))

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
        at = Leaves(model_params, grads, hidden, states_later=True)
        if not at.active:
            return at.tree([None] * len(at.params)), hidden
        if any("tensor" not in at.states[i] for i in at.active):
            raise at.missing("tensor")
        given, states = list(at.states), list(at.states)
        delta: list[Any] = [None] * len(at.params)
        # The stacks of the first pass do for the second where the states are still the same.
        memo: dict[int, Any] | None = {} if own and not observes else None
        told: dict[str, Any] = {"shared": hidden.shared}
        seen = list(seeing.run(at, opt_params, {}, told, own=own, memo=memo))
        summaries = _in_order(seen, at.active)
        tensors = _Tensors([given[i]["tensor"] for i in at.active], own)
        try:
            controls, new, shared = mix(
                trees.cast(opt_params, summaries.dtype),
                summaries,
                tensors.stacked(),
                hidden.shared,
                **({"loss": loss, "extras": extras} if needs else {}),
            )
        except RULE_ERRORS as error:
            better = at.explained(error, init, opt_params, dict)  # no key of a state is meant
            if better is error:
                raise
            raise better from error
        controls, shared = trees.map(tensors.spared, (controls, shared))
        own_states = tensors.after(new)
        if observes:
            for done in seen:
                for i, state in zip(done.group, done.states, strict=True):
                    at.states[i] = state
        rows = {"control": Rows(controls, at.active)}
        for done in moving.run(at, opt_params, {}, {}, rows=rows, own=own, memo=memo):
            for i, d, state in zip(done.group, done.deltas(), done.states, strict=True):
                delta[i], states[i] = d, state
        for i, state in zip(at.active, own_states, strict=True):
            # A dict whose memory took all that is new is handed back as it came.
            if states[i] is not given[i] or state is not given[i]["tensor"]:
                states[i] = {**states[i], "tensor": state}
        return at.tree(delta), Hidden(at.tree(states), shared)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **given: Any
    ) -> tuple[Tree, Hidden]:
        return advance(opt_params, model_params, grads, hidden, **given)

    consuming(update, functools.partial(advance, own=True))
    return Optimizer(fresh(init), start, update, needs)


def _observing(rule: Any) -> Callable[..., Any]:
    """The rule's ``observe``, or its ``summary`` as one that gives no state: it changes none."""
    if hasattr(rule, "observe"):
        return required(rule, "observe")
    summary = required(rule, "summary")
    return lambda th, p, g, h, shared, **batch: (summary(th, p, g, h, **batch), {})


def _in_order(seen: Sequence[Done], active: Sequence[int]) -> Tensor:
    """The summaries as ``(L, S)``, in the order of the leaves, in their common dtype."""
    stacks = [x.delta.unsqueeze(0) if len(x.group) == 1 else x.delta for x in seen]
    dtype = stacks[0].dtype
    for x in stacks:
        dtype = torch.promote_types(dtype, x.dtype)
    stacks = [x.to(dtype) for x in stacks]
    order = [i for x in seen for i in x.group]
    if order == list(active):
        return torch.cat(stacks)
    if can_index(stacks[0]):
        at = {i: row for row, i in enumerate(order)}
        return torch.cat(stacks).index_select(0, torch.tensor([at[i] for i in active]))
    rows = dict(zip(order, (row for x in stacks for row in x.unbind(0)), strict=True))
    return torch.stack([rows[i] for i in active])


class _Tensors:
    """The states that tensors have as a whole, stacked and taken apart."""

    def __init__(self, states: Sequence[dict[str, Any]], own: bool) -> None:
        self._states, self._spec = states, None
        if not all(isinstance(x, Tensor) for x in states[0].values()):
            self._spec = trees.flatten(states[0])[1]
            states = [_by_number(state) for state in states]
        self._kinds = {k: [s[k].dtype for s in states] for k in states[0]}
        self._columns = Columns(states, list(states[0]), own)
        self.spared = self._columns.spared

    def stacked(self) -> Tree:
        """What `mix` gets."""
        given = self._columns.given
        return dict(given) if self._spec is None else trees.unflatten(self._spec, given.values())

    def after(self, new: Tree) -> Sequence[dict[str, Any]]:
        """The state of each tensor, out of what `mix` gave back, in the dtypes it had."""
        flat = new if self._spec is None else _by_number(new)
        # Tensors of several dtypes were promoted to be stacked: each state keeps its own.
        kinds, several = self._kinds, False
        for k in flat.keys() & kinds.keys():
            if len(set(kinds[k])) > 1:
                several = True
            else:
                flat = {**flat, k: flat[k].to(kinds[k][0])}
        found = self._columns.put(flat)
        if several:
            found = [
                {k: x.to(kinds[k][i]) if k in kinds else x for k, x in state.items()}
                for i, state in enumerate(found)
            ]
        if self._spec is None:
            return found
        spec = trees.flatten(new)[1]
        return [trees.unflatten(spec, state.values()) for state in found]


def _by_number(tree: Tree) -> dict[str, Any]:
    return {str(j): x for j, x in enumerate(trees.leaves(tree))}
