"""`accumulate`: one update from the mean of several gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import applied_as_is
from fmeta.combinators._parts import check_entries, delta_dtype, start
from fmeta.combinators._wrapped import choose, unwrapped, whole, wrapped
from fmeta.optimizer import Hidden, Optimizer, check_optimizer_type

__all__ = ["accumulate"]

Tree = Any
_KEYS = ("sum", "count")


def accumulate(optimizer: Optimizer, every: Any) -> Optimizer:
    """Adds up gradients, and makes one update with their mean every so many steps.

    In between the delta is zero and the optimizer's state stays. So ``every`` steps on small
    batches are one on a batch that is as many times larger, as in ``optax.MultiSteps``. Which of
    them it is is chosen by `torch.where`: the optimizer computes an update at each step.

    A leaf's mean is over the gradients that it got. Where there is none (None) at the step of the
    update, the leaf stays as it is, and its gradients wait for the next one.

    Args:
        optimizer: any `Optimizer` with a `Hidden` state. Its horizon is ``num_steps`` divided by
            ``every``, rounded down, but at least 1. One that needs the loss is given the mean
            loss; extras are those of the last step.
        every: gradients an update: an integer or an integer scalar tensor.

    Returns:
        An `Optimizer` with the same ``opt_params``; hidden at each leaf: ``inner``, ``sum``
        ``(*leaf)`` and ``count`` (int64) of gradients since its last update; shared: ``inner``,
        ``t`` (steps since the last update, int64) and, where it is needed, ``loss``.

    Raises:
        ValueError: ``every`` is no integer, or below 1.

    Example:
        >>> import fmeta
        >>> rule = accumulate(fmeta.optimizers.sgd(0.5), every=2)
        >>> p = torch.ones(())
        >>> h = rule.init_hidden({}, p)
        >>> for g in (1.0, 3.0):
        ...     p, h = rule.step({}, p, torch.tensor(g), h)
        ...     print(p)
        tensor(1.)
        tensor(0.)
    """
    check_optimizer_type(optimizer, "optimizer")
    whole("every", every)
    reads_loss = "loss" in optimizer.needs

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        inner = start(optimizer, opt_params, model_params, _updates(num_steps, every))
        device = trees.common_device(model_params)
        own = [
            {}
            if p is None
            else {
                "sum": torch.zeros_like(p, dtype=trees.compute_dtype(p)),
                "count": torch.zeros((), dtype=torch.int64, device=device),
            }
            for p in trees.leaves(model_params)
        ]
        shared = {"t": torch.zeros((), dtype=torch.int64, device=device), "inner": inner.shared}
        if reads_loss:
            shared["loss"] = torch.zeros((), dtype=delta_dtype(model_params), device=device)
        return wrapped(model_params, inner, own, shared)

    def update(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Hidden,
        *,
        loss: Tensor | None = None,
        extras: Any = None,
    ) -> tuple[Tree, Hidden]:
        check_entries(hidden.shared, ("t", "inner"), "the shared hidden state of accumulate")
        inner, states = unwrapped(model_params, hidden, hidden.shared["inner"], _KEYS)
        found = trees.match(model_params, grads, "the gradient")
        spec = trees.flatten(model_params)[1]
        steps = hidden.shared["t"] + 1
        ready = steps >= every
        shared: dict[str, Any] = {**hidden.shared, "t": torch.where(ready, 0, steps)}
        if reads_loss and loss is not None:
            total = hidden.shared["loss"] + loss
            loss = total / steps
            shared["loss"] = torch.where(ready, 0.0, total).to(hidden.shared["loss"].dtype)
        sums: list[dict[str, Any]] = []
        means: list[Any] = []
        for s, g in zip(states, found, strict=True):
            if not s or g is None:
                sums.append({k: s[k] for k in s if k != "inner"})
                means.append(None)
                continue
            total, count = s["sum"] + g.to(s["sum"].dtype), s["count"] + 1
            means.append(total / count)
            sums.append(
                {"sum": torch.where(ready, 0.0, total), "count": torch.where(ready, 0, count)}
            )
        delta, new = optimizer.update(
            opt_params, model_params, trees.unflatten(spec, means), inner, loss=loss, extras=extras
        )
        delta = trees.map(lambda d: None if d is None else torch.where(ready, d, 0.0), delta)
        kept = Hidden(choose(ready, new.leaves, inner.leaves), {})
        shared["inner"] = choose(ready, new.shared, inner.shared)
        return delta, wrapped(model_params, kept, sums, shared)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        inner, _ = unwrapped(model_params, hidden, hidden.shared["inner"], _KEYS)
        return optimizer.eval_params(opt_params, model_params, inner)

    applied_as_is(update, optimizer)
    return optimizer._replace(init_hidden=init_hidden, update=update, eval_params=eval_params)


def _updates(num_steps: Any, every: Any) -> Any:
    """How many updates there are in so many steps."""
    if isinstance(num_steps, int) and isinstance(every, int):
        return max(1, num_steps // every)
    if num_steps is None:
        return None
    device = num_steps.device if isinstance(num_steps, Tensor) else every.device
    steps = torch.as_tensor(num_steps, device=device)
    return torch.div(steps, every, rounding_mode="floor").clamp(min=1)
