"""One step on given lists of tensors: the pure update, then parameters changed in place.

This is the part of a step that `torch.compile` sees. It depends on no Python number that changes
from step to step where learning rates are tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.optimizer import Hidden, Optimizer
from fmeta.torch_optim import _sharded

__all__ = ["GroupOptions", "advance", "all_finite"]

Tree = Any


class GroupOptions(NamedTuple):
    """What a parameter group says about some leaves.

    Attributes:
        keys: where they are in the trees.
        lr, weight_decay: numbers or scalar tensors.
        maximize: whether to climb.
    """

    keys: Sequence[Any]
    lr: Any
    weight_decay: Any
    maximize: bool


def advance(
    optimizer: Optimizer,
    opt_params: Tree,
    params: Any,
    grads: Any,
    hidden: Hidden,
    groups: Sequence[GroupOptions],
    loss: Tensor | None,
    extras: Mapping[str, Any] | None,
    skipped: Tensor | None,
    in_place: bool,
) -> tuple[Any, Tree, Tensor | None]:
    """Updates the parameters in place and returns what replaces the hidden state.

    Args:
        optimizer, opt_params: the rule.
        params, grads: dicts or lists of tensors, None at leaves that stay as they are.
        hidden: state of the same leaves.
        groups: the leaves of each group and its options.
        loss, extras: what the rule may need.
        skipped: count of steps without effect, because a gradient (or the loss) was not finite;
            None: such steps are made.
        in_place: whether the hidden state is written into the tensors that hold it.

    Returns:
        ``(leaves, shared, skipped)``.
    """
    for group in groups:
        if group.maximize:
            grads = _replaced(grads, group.keys, torch._foreach_neg([grads[k] for k in group.keys]))
    update = _sharded.update if _sharded.is_sharded(params) else _plain
    delta, new = update(optimizer, opt_params, params, grads, hidden, loss=loss, extras=extras)
    keys = [k for group in groups for k in group.keys]
    leaves = {k: new.leaves[k] for k in keys}
    shared = new.shared
    finite = None
    if skipped is not None:
        finite = all_finite([grads[k] for k in keys], loss)
        leaves = {k: _where(finite, leaves[k], hidden.leaves[k]) for k in keys}
        shared = _where(finite, shared, hidden.shared)
        skipped = skipped + (~finite).to(skipped.dtype)
    for group in groups:
        own = [k for k in group.keys if delta[k] is not None]
        if own:
            _move(
                [params[k] for k in own],
                [delta[k] for k in own],
                group.lr,
                group.weight_decay,
                finite,
            )
    if in_place:
        for k in keys:
            _write(hidden.leaves[k], leaves[k])
        _write(hidden.shared, shared)
        return {k: hidden.leaves[k] for k in keys}, hidden.shared, skipped
    return leaves, shared, skipped


def all_finite(tensors: Sequence[Tensor], loss: Tensor | None = None) -> Tensor:
    """Whether no element is infinite or NaN, as a scalar tensor."""
    some = [x for x in tensors if x.numel()]
    if loss is not None:
        some.append(loss)
    if not some:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device if tensors else None)
    largest = torch._foreach_norm(some, ord=float("inf"))
    return torch.stack([x.to(torch.float32) for x in largest]).isfinite().all()


def _plain(optimizer: Optimizer, *args: Any, **kwargs: Any) -> tuple[Tree, Any]:
    return optimizer.update(*args, **kwargs)


def _replaced(tree: Any, keys: Sequence[Hashable], values: Sequence[Tensor]) -> Any:
    new = dict(tree) if isinstance(tree, dict) else list(tree)
    for k, x in zip(keys, values, strict=True):
        new[k] = x  # type: ignore[call-overload, index]
    return new


def _where(finite: Tensor, new: Tree, old: Tree) -> Tree:
    return trees.map(
        lambda n, o: torch.where(finite, n, o) if isinstance(n, Tensor) else n, new, old
    )


def _write(old: Tree, new: Tree) -> None:
    targets, found = trees.leaves(old), trees.leaves(new)
    pairs = [
        (o, n) for o, n in zip(targets, found, strict=True) if isinstance(o, Tensor) and o is not n
    ]
    # An entry that takes the old value of another one is copied before that is overwritten.
    values = [n.clone() if any(n is o for o in targets) else n for _, n in pairs]
    for (o, _), n in zip(pairs, values, strict=True):
        o.copy_(n)


def _move(
    params: list[Tensor], delta: list[Tensor], lr: Any, weight_decay: Any, finite: Tensor | None
) -> None:
    """``p += lr * delta - lr * weight_decay * p``, in the compute dtype, cast once."""
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    kept = 1 - lr * weight_decay if decays else 1.0
    if finite is not None:
        # Minus zero is what leaves every number as it is, +0 and -0 too.
        delta = [torch.where(finite, d, -0.0) for d in delta]
        if decays:
            kept = torch.where(finite, kept, 1.0)
    wide = [p.dtype is trees.compute_dtype(p) for p in params]
    at = [i for i, w in enumerate(wide) if w]
    if at:
        own = [params[i] for i in at]
        change = [delta[i].to(params[i].dtype) for i in at]
        if decays:
            torch._foreach_mul_(own, kept)
        if isinstance(lr, Tensor):
            torch._foreach_add_(own, torch._foreach_mul(change, lr))
        else:
            torch._foreach_add_(own, change, alpha=lr)
    at = [i for i, w in enumerate(wide) if not w]
    if at:
        own = [params[i] for i in at]
        dtypes = [trees.compute_dtype(p) for p in own]
        sums = torch._foreach_mul([delta[i].to(t) for i, t in zip(at, dtypes, strict=True)], lr)
        wider = [p.to(t) for p, t in zip(own, dtypes, strict=True)]
        if decays:
            torch._foreach_mul_(wider, kept)
        torch._foreach_add_(wider, sums)
        torch._foreach_copy_(own, wider)
