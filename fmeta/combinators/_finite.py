"""`apply_if_finite`: gradients that are no numbers change nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import applied_as_is
from fmeta.combinators._parts import check_entries, start
from fmeta.combinators._wrapped import choose, whole
from fmeta.optimizer import Hidden, Optimizer, check_optimizer_type

__all__ = ["apply_if_finite"]

Tree = Any


def apply_if_finite(optimizer: Optimizer, max_consecutive_errors: Any = None) -> Optimizer:
    """Skips the update where a gradient holds an infinity or a NaN: delta 0, state as it was.

    The decision is one for the whole tree, made by `torch.where` (nothing is read back from the
    device). The optimizer is given zeros in place of the gradients that are refused, so that
    derivatives with respect to ``opt_params`` and hidden state stay finite. Where the optimizer
    needs the loss, one that is not finite is refused too. What overflows in the rule itself (the
    square of a huge gradient) is not looked at.

    As in optax, ``max_consecutive_errors`` in a row are skipped; the next one, if it is bad as
    well, goes to the optimizer as it is, so that a training that is lost shows it.

    A meta-gradient goes back through the loss that gave the gradient. There a factor 0 does not
    help against second derivatives that are infinite or NaN themselves;
    ``unroll(first_order="gradients")`` leaves that path out.

    Args:
        optimizer: any `Optimizer` with a `Hidden` state.
        max_consecutive_errors: how many bad gradients in a row are skipped: an integer, an integer
            tensor, or None: all.

    Returns:
        An `Optimizer` with the same ``opt_params``; shared hidden state: ``skipped`` (updates
        skipped so far) and ``consecutive`` (bad gradients in a row up to now), int64 scalars, and
        ``inner``.

    Raises:
        ValueError: ``max_consecutive_errors`` is no integer, or negative.

    Example:
        >>> import fmeta
        >>> rule = apply_if_finite(fmeta.optimizers.adam(0.1))
        >>> p = {"w": torch.ones(2)}
        >>> h = rule.init_hidden({}, p)
        >>> p, h = rule.step({}, p, {"w": torch.tensor([1.0, torch.nan])}, h)
        >>> p, h.shared["skipped"]
        ({'w': tensor([1., 1.])}, tensor(1))

    Reference:
        ``optax.apply_if_finite``; Micikevicius et al. 1710.03740, section 3.2 (skipped updates).
    """
    check_optimizer_type(optimizer, "optimizer")
    if max_consecutive_errors is not None:
        whole("max_consecutive_errors", max_consecutive_errors, least=0)

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        own = start(optimizer, opt_params, model_params, num_steps)
        device = trees.common_device(model_params)
        zeros = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)]
        shared = {"skipped": zeros[0], "consecutive": zeros[1], "inner": own.shared}
        return Hidden(own.leaves, shared)

    def update(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Hidden,
        *,
        loss: Tensor | None = None,
        extras: Any = None,
    ) -> tuple[Tree, Hidden]:
        counts = ("skipped", "consecutive")
        check_entries(hidden.shared, (*counts, "inner"), "the shared state of apply_if_finite")
        found = trees.match(model_params, grads, "the gradient")
        spec = trees.flatten(model_params)[1]
        # In the compute dtype, in which the rule will read it.
        flat = [
            None if g is None else g.to(trees.compute_dtype(g if p is None else p))
            for g, p in zip(found, trees.leaves(model_params), strict=True)
        ]
        read = [g for g in flat if g is not None]
        if loss is not None and "loss" in optimizer.needs:
            read.append(loss)
        skipped, consecutive = (hidden.shared[k] for k in counts)
        old = Hidden(hidden.leaves, hidden.shared["inner"])
        if not read:  # nothing is updated, and nothing judged
            delta, new = optimizer.update(
                opt_params, model_params, grads, old, loss=loss, extras=extras
            )
            return delta, Hidden(new.leaves, {**hidden.shared, "inner": new.shared})
        finite = torch.stack([x.isfinite().all() for x in read]).all()
        in_a_row = torch.where(finite, 0, consecutive + 1)
        taken = finite
        if max_consecutive_errors is not None:
            taken = finite | (in_a_row > max_consecutive_errors)
        safe = [None if g is None else torch.where(taken, g, 0.0) for g in flat]
        if loss is not None and "loss" in optimizer.needs:
            loss = torch.where(taken, loss, 0.0)
        delta, new = optimizer.update(
            opt_params, model_params, trees.unflatten(spec, safe), old, loss=loss, extras=extras
        )
        delta = trees.map(lambda d: None if d is None else torch.where(taken, d, 0.0), delta)
        shared = {
            "skipped": torch.where(taken, skipped, skipped + 1),
            "consecutive": in_a_row,
            "inner": choose(taken, new.shared, old.shared),
        }
        return delta, Hidden(choose(taken, new.leaves, old.leaves), shared)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        own = Hidden(hidden.leaves, hidden.shared["inner"])
        return optimizer.eval_params(opt_params, model_params, own)

    applied_as_is(update, optimizer)
    return Optimizer(optimizer.init, init_hidden, update, optimizer.needs, eval_params)
