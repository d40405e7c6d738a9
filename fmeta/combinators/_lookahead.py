"""`lookahead`: slow weights that follow the fast ones from time to time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import applied_as_is, is_leafwise, leafwise
from fmeta._numbers import check_number
from fmeta.combinators._parts import start
from fmeta.combinators._wrapped import unwrapped, whole, wrapped
from fmeta.optimizer import Hidden, Optimizer, check_optimizer_type

__all__ = ["lookahead"]

Tree = Any
_KEYS = ("slow", "count")


def lookahead(optimizer: Optimizer, every: Any = 6, slow_rate: Any = 0.5) -> Optimizer:
    """Every so many updates, goes back to a point between the last such point and here.

    ``slow += slow_rate (fast - slow)`` after each ``every`` updates of the fast weights, which are
    the parameters; then ``fast = slow``. At first ``slow = fast``. The optimizer's own state stays
    as it is. ``eval_params`` gives the slow weights, which are what the algorithm returns (through
    the optimizer's own ``eval_params``).

    What scales or changes deltas (a schedule, weight decay) belongs inside: outside it would take
    part in the way back too. In `fmeta.torch_optim` leave the rate of a group at 1.

    Args:
        optimizer: any `Optimizer` with a `Hidden` state.
        every: updates between two returns: an integer or an integer scalar tensor.
        slow_rate: a number or scalar tensor; 1 gives the optimizer itself.

    Returns:
        An `Optimizer` with the same ``opt_params``; hidden at each leaf: ``inner``, ``slow``
        ``(*leaf)`` in the compute dtype and ``count`` (int64) of the leaf's updates.

    Raises:
        ValueError: ``every`` is no integer or below 1; ``slow_rate`` is negative or not finite.

    Example:
        >>> import fmeta
        >>> rule = lookahead(fmeta.optimizers.sgd(1.0), every=2)
        >>> p = torch.zeros(())
        >>> h = rule.init_hidden({}, p)
        >>> for _ in range(4):
        ...     p, h = rule.step({}, p, torch.ones(()), h)
        ...     print(p)
        tensor(-1.)
        tensor(-1.)
        tensor(-2.)
        tensor(-2.)

    Reference:
        Zhang et al., "Lookahead optimizer: k steps forward, 1 step back", 1907.08610, algorithm 1.
    """
    check_optimizer_type(optimizer, "optimizer")
    whole("every", every)
    check_number("slow_rate", slow_rate)

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        inner = start(optimizer, opt_params, model_params, num_steps)
        own = [
            {}
            if p is None
            else {
                "slow": p.to(trees.compute_dtype(p), copy=True),
                "count": torch.zeros((), dtype=torch.int64, device=p.device),
            }
            for p in trees.leaves(model_params)
        ]
        return wrapped(model_params, inner, own, inner.shared)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        inner, states = unwrapped(model_params, hidden, hidden.shared, _KEYS)
        found = trees.match(model_params, grads, "the gradient")
        delta, new = optimizer.update(opt_params, model_params, grads, inner, **extra)
        flat, spec = trees.flatten(model_params)
        changes = trees.leaves(delta)
        own = []
        for i, (p, g, d, s) in enumerate(zip(flat, found, changes, states, strict=True)):
            if not s or g is None or d is None:
                own.append({k: s[k] for k in s if k != "inner"})
                continue
            slow, count = s["slow"], s["count"] + 1
            back = count % every == 0
            p = p.to(slow.dtype)
            rate = (
                slow_rate.to(slow.device, slow.dtype)
                if isinstance(slow_rate, Tensor)
                else slow_rate
            )
            slow = torch.where(back, torch.lerp(slow, p + d, rate), slow)
            changes[i] = torch.where(back, slow - p, d)
            own.append({"slow": slow, "count": count})
        return trees.unflatten(spec, changes), wrapped(model_params, new, own, new.shared)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        inner, states = unwrapped(model_params, hidden, hidden.shared, _KEYS)
        flat, spec = trees.flatten(model_params)
        slow = [s["slow"].to(p.dtype) if s else p for p, s in zip(flat, states, strict=True)]
        return optimizer.eval_params(opt_params, trees.unflatten(spec, slow), inner)

    applied_as_is(update)
    if is_leafwise(optimizer):
        leafwise(update)
    return optimizer._replace(init_hidden=init_hidden, update=update, eval_params=eval_params)
