"""`treewise`: an optimizer whose tensors talk to each other (hierarchical rules)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leaves import RULE_ERRORS, Leaves, check_state, start_leaves
from fmeta._lift import lift
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
            - ``batched`` (optional): if true, ``update`` gets small leaves of one shape stacked,
              ``update(..., batch=1)`` with a leading axis everywhere, instead of under `vmap`.

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

    def observing(shared: dict[str, Any]) -> Callable[..., Any]:
        def observed(th: Tree, p: Tensor, g: Tensor, h: dict[str, Any]) -> Any:
            summary, new = observe(th, p, g, h, shared)
            return summary, check_state(new, "observe")

        return observed

    def update_leaf(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Any], control: Tensor, **batch: int
    ) -> Any:
        delta, new = change(th, p, g, h, control, **batch)
        check_delta(delta, p)
        return delta, new

    def start(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_num_steps(needs, num_steps)
        extra = {"num_steps": num_steps} if "num_steps" in needs else {}
        leaves = start_leaves(init_leaf, opt_params, model_params)
        return Hidden(leaves, init_shared(opt_params, model_params, **extra))

    def update(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Hidden,
        *,
        loss: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> tuple[Tree, Hidden]:
        check_needs(needs, loss, extras)
        at = Leaves(model_params, grads, hidden)
        if not at.active:
            return at.tree([None] * len(at.params)), hidden
        if any("tensor" not in at.states[i] for i in at.active):
            raise at.missing("tensor")
        # Both passes over the tensors reuse the grouping of `lift`; the first one's "delta" is the
        # summary, the second one's "hyper-parameter" the row of controls.
        states, moved = list(at.states), [_own(state) for state in at.states]
        first = lift(init, init_hidden, observing(hidden.shared))
        given = Hidden(at.tree(moved), hidden.shared)
        summaries, seen = first.update(opt_params, model_params, grads, given)
        found = trees.leaves(summaries)
        rows = [found[i] for i in at.active]
        dtype = rows[0].dtype
        for x in rows:
            dtype = torch.promote_types(dtype, x.dtype)
        columns = [trees.leaves(at.states[i]["tensor"]) for i in at.active]
        spec = trees.flatten(at.states[at.active[0]]["tensor"])[1]
        tensors = trees.unflatten(spec, [torch.stack(c) for c in zip(*columns, strict=True)])
        try:
            controls, tensors, shared = mix(
                trees.cast(opt_params, dtype),
                torch.stack([x.to(dtype) for x in rows]),
                tensors,
                hidden.shared,
                **({"loss": loss, "extras": extras} if needs else {}),
            )
        except RULE_ERRORS as error:
            better = at.explained(error, init, opt_params, dict)  # no key of a state is meant
            if better is error:
                raise
            raise better from error
        told = controls.unbind(0)  # fake CUDA tensors refuse an index
        control: list[Any] = [told[0]] * len(at.params)
        if observes:
            moved = trees.flatten_up_to(at.spec, seen.leaves, model_params, "the hidden state")
        parts = [x.unbind(0) for x in trees.leaves(tensors)]
        new_spec = trees.flatten(tensors)[1]
        for j, i in enumerate(at.active):
            control[i] = told[j]
            # Tensors of several dtypes were promoted to be stacked: each state keeps its own.
            own = trees.unflatten(
                new_spec, [x[j].to(c.dtype) for x, c in zip(parts, columns[j], strict=True)]
            )
            states[i] = {"tensor": own}
        second = lift(
            init,
            init_hidden,
            update_leaf,
            hypers=lambda th: {"control": at.tree(control)},
            batched=getattr(rule, "batched", False),
        )
        delta, new = second.update(opt_params, model_params, grads, Hidden(at.tree(moved), shared))
        after = trees.flatten_up_to(at.spec, new.leaves, model_params, "the hidden state")
        for i in at.active:
            states[i] = {**after[i], **states[i]}
        return delta, Hidden(at.tree(states), shared)

    return Optimizer(fresh(init), start, update, needs)


def _observing(rule: Any) -> Callable[..., Any]:
    """The rule's ``observe``, or its ``summary`` as one that gives no state: it changes none."""
    if hasattr(rule, "observe"):
        return required(rule, "observe")
    summary = required(rule, "summary")
    return lambda th, p, g, h, shared: (summary(th, p, g, h), {})


def _own(h: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in h.items() if k != "tensor"}
