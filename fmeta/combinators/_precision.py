"""Wrappers about number formats: float32 copies of low-precision parameters, half-size states."""

from __future__ import annotations

from typing import Any

import torch

from fmeta import trees
from fmeta._leafwise import applied_as_is
from fmeta.combinators._parts import start, states_of
from fmeta.optimizer import (
    Hidden,
    Optimizer,
    apply_updates,
    check_optimizer_type,
    check_params,
)

__all__ = ["hidden_dtype", "master_weights"]

Tree = Any


def master_weights(optimizer: Optimizer) -> Optimizer:
    """Keeps a copy of each low-precision parameter in the compute dtype and updates that.

    A bfloat16 parameter holds 8 bits: adding a small delta to it is lost (``1 - 1e-3 == 1``). With
    this wrapper the delta is added to the float32 copy, and the parameter is the copy, rounded.

    Args:
        optimizer: any `Optimizer` with a `Hidden` state. It sees the copies as the parameters.

    Returns:
        An `Optimizer` with the same ``opt_params``; the hidden dict at a leaf of lower precision
        than the compute dtype also holds ``"master"``. Parameters that were changed by anything
        but this optimizer are overwritten from the copy.

    Reference:
        Micikevicius et al. 1710.03740, section 3.1.

    Example:
        >>> import fmeta
        >>> p = {"w": torch.ones(1, dtype=torch.bfloat16)}
        >>> rule = master_weights(fmeta.optimizers.sgd(1e-3))
        >>> h = rule.init_hidden({}, p)
        >>> for _ in range(4):
        ...     p, h = rule.step({}, p, {"w": torch.ones(1, dtype=torch.bfloat16)}, h)
        >>> p["w"]
        tensor([0.9961], dtype=torch.bfloat16)
    """

    check_optimizer_type(optimizer, "optimizer")

    def copies(model_params: Tree, states: list[Any]) -> Tree:
        flat, spec = trees.flatten(model_params)
        return trees.unflatten(
            spec, [s.get("master", p) for p, s in zip(flat, states, strict=True)]
        )

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_params(model_params)
        flat, spec = trees.flatten(model_params)
        low = [p is not None and p.dtype is not trees.compute_dtype(p) for p in flat]
        masters = [
            p.to(trees.compute_dtype(p)) if is_low else p
            for p, is_low in zip(flat, low, strict=True)
        ]
        hidden = start(optimizer, opt_params, trees.unflatten(spec, masters), num_steps)
        states = states_of(model_params, hidden)
        return Hidden(
            trees.unflatten(
                spec,
                [
                    {"inner": s, "master": m} if is_low else {"inner": s}
                    for s, m, is_low in zip(states, masters, low, strict=True)
                ],
            ),
            hidden.shared,
        )

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        flat, spec = trees.flatten(model_params)
        states = states_of(model_params, hidden)
        masters = copies(model_params, states)
        inner = Hidden(trees.unflatten(spec, [_inner(s) for s in states]), hidden.shared)
        delta, inner = optimizer.update(opt_params, masters, grads, inner, **extra)
        moved = trees.leaves(apply_updates(masters, delta))
        new = states_of(model_params, inner)
        changes = trees.leaves(delta)
        for i, (p, s) in enumerate(zip(flat, states, strict=True)):
            if changes[i] is not None and "master" in s:
                # So that parameter + delta, rounded once, is the rounded copy.
                changes[i] = moved[i] - p.to(moved[i].dtype)
        leaves = [
            {"inner": n, "master": m} if "master" in s else {"inner": n}
            for n, m, s in zip(new, moved, states, strict=True)
        ]
        return trees.unflatten(spec, changes), Hidden(trees.unflatten(spec, leaves), inner.shared)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        flat, spec = trees.flatten(model_params)
        states = states_of(model_params, hidden)
        inner = Hidden(trees.unflatten(spec, [_inner(s) for s in states]), hidden.shared)
        shown = trees.leaves(optimizer.eval_params(opt_params, copies(model_params, states), inner))
        return trees.unflatten(
            spec, [p if p is None else x.to(p.dtype) for p, x in zip(flat, shown, strict=True)]
        )

    applied_as_is(update)
    return Optimizer(optimizer.init, init_hidden, update, optimizer.needs, eval_params)


def hidden_dtype(optimizer: Optimizer, dtype: torch.dtype = torch.bfloat16) -> Optimizer:
    """Stores the floating hidden state of each parameter in another dtype between the steps.

    The arithmetic stays in the compute dtype; only what is kept is rounded. State of the whole
    model (``hidden.shared``), integers and the copies of `master_weights` are kept as they are.

    Args:
        optimizer: any `Optimizer` with a `Hidden` state.
        dtype: floating dtype, such as ``torch.bfloat16`` for half the memory.

    Returns:
        An `Optimizer` with the same ``opt_params``.

    Example:
        >>> import fmeta
        >>> rule = hidden_dtype(fmeta.optimizers.adam())
        >>> rule.init_hidden({}, {"w": torch.ones(2)}).leaves["w"]["m"].dtype
        torch.bfloat16
    """
    check_optimizer_type(optimizer, "optimizer")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"hidden_dtype must be a floating dtype, such as torch.bfloat16, got {dtype!r}"
        )

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        hidden = start(optimizer, opt_params, model_params, num_steps)
        return Hidden(_stored(model_params, hidden, dtype), hidden.shared)

    def widened(model_params: Tree, hidden: Hidden) -> Hidden:
        flat, spec = trees.flatten(model_params)
        states = states_of(model_params, hidden)
        wide = [
            s if p is None else trees.cast(s, trees.compute_dtype(p))
            for p, s in zip(flat, states, strict=True)
        ]
        return Hidden(trees.unflatten(spec, wide), hidden.shared)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        delta, new = optimizer.update(
            opt_params, model_params, grads, widened(model_params, hidden), **extra
        )
        return delta, Hidden(_stored(model_params, new, dtype), new.shared)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        return optimizer.eval_params(opt_params, model_params, widened(model_params, hidden))

    applied_as_is(update, optimizer)
    return Optimizer(optimizer.init, init_hidden, update, optimizer.needs, eval_params)


def _stored(model_params: Tree, hidden: Hidden, dtype: torch.dtype) -> Tree:
    """The states of all leaves as they are kept."""
    spec = trees.flatten(model_params)[1]
    return trees.unflatten(spec, [_rounded(s, dtype) for s in states_of(model_params, hidden)])


def _rounded(state: Any, dtype: torch.dtype) -> Any:
    if not isinstance(state, dict):
        return trees.cast(state, dtype)
    copied = state.keys() == {"inner", "master"}  # rounding that copy is what it is to prevent
    return {k: x if copied and k == "master" else _rounded(x, dtype) for k, x in state.items()}


def _inner(state: dict[str, Any]) -> dict[str, Any]:
    """The wrapped optimizer's state of one leaf; empty where the leaf is another optimizer's."""
    return state["inner"] if state else state
