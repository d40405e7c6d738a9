"""One step on given tensors: the pure update, then parameters changed in place.

This is the part of a step that `torch.compile` sees. It depends on no Python number that changes
from step to step where learning rates are tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import consuming_update, hands_deltas_on
from fmeta.optimizer import Hidden, Optimizer
from fmeta.torch_optim import _sharded
from fmeta.torch_optim._in_place import apart, move, overlap, write

__all__ = ["GroupOptions", "Inputs", "Outputs", "advance", "all_finite"]

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


class Inputs(NamedTuple):
    """What a step depends on.

    Attributes:
        opt_params: weights of the rule.
        params, grads: dicts or lists of tensors, None at leaves that stay as they are.
        hidden: state of the same leaves.
        groups: the leaves of each group, and its options.
        loss, extras: what the rule may need.
        skipped: count of the steps without effect because of a gradient (or a loss) that was not
            finite; None: such steps are made.
        sharded: whether any parameter is a DTensor.
        in_place: whether the hidden state is written into the tensors that hold it.
        consumes: whether a rule that can may use the memory of the old hidden state.
        careful: whether to look for wrong shapes and for memory that is used twice.
    """

    opt_params: Tree
    params: Any
    grads: Any
    hidden: Hidden
    groups: Sequence[GroupOptions]
    loss: Tensor | None
    extras: Mapping[str, Any] | None
    skipped: Tensor | None
    sharded: bool
    in_place: bool
    consumes: bool
    careful: bool


class Outputs(NamedTuple):
    """What a step gives, beside parameters that have changed.

    Attributes:
        leaves: the new hidden state by key; shared: that of the whole model.
        skipped: as in `Inputs`.
        clean: whether parameters, gradients and new state were found to use different memory.
    """

    leaves: dict[Any, Any]
    shared: Tree
    skipped: Tensor | None
    clean: bool


def advance(optimizer: Optimizer, x: Inputs) -> Outputs:
    """Updates the parameters in place and returns what replaces the hidden state."""
    grads = x.grads
    for group in x.groups:
        if group.maximize:
            grads = _negated(grads, group.keys)
    update = _sharded.update if x.sharded else _consuming if x.consumes else _plain
    given: dict[str, Any] = {"loss": x.loss, "extras": x.extras}
    if x.consumes and not x.careful and hands_deltas_on(optimizer):
        # Whatever it leaves undone if it fails, its state is lost anyway.
        given["then"] = _mover(x)
    delta, new = update(optimizer, x.opt_params, x.params, grads, x.hidden, **given)
    if x.careful:
        trees.match(x.params, delta, "the optimizer's delta")
    keys = [k for group in x.groups for k in group.keys]
    leaves = {k: new.leaves[k] for k in keys}
    shared, skipped, finite = new.shared, x.skipped, None
    if skipped is not None:
        read = x.loss if "loss" in optimizer.needs else None
        finite = all_finite([grads[k] for k in keys], read, x.params if x.sharded else ())
        leaves = {k: _where(finite, leaves[k], x.hidden.leaves[k]) for k in keys}
        shared = _where(finite, shared, x.hidden.shared)
        skipped = skipped + torch.logical_not(finite).to(skipped.dtype)
    changes = {k: delta[k] for k in keys if delta[k] is not None}
    clean = False
    if x.in_place:
        # Before the parameters move, of which the new state may be a view.
        found = write(
            [*(x.hidden.leaves[k] for k in keys), x.hidden.shared, x.skipped],
            [*(leaves[k] for k in keys), shared, skipped],
            [*(delta[k] for k in keys), None, None],
        )
        changes = {k: d for k, d in zip(keys, found, strict=False) if d is not None}
        skipped = x.skipped
        leaves, shared = {}, {}
    elif x.careful:
        before = [x.params[k] for k in keys], [grads[k] for k in keys]
        leaves, shared, clean = apart([*before[0], *before[1]], leaves, shared)
        clean = clean and not overlap(*before)
    for group in x.groups:
        own = [k for k in group.keys if k in changes]
        params, moves = [x.params[k] for k in own], [changes[k] for k in own]
        if x.sharded:
            params, moves = ([_sharded.local(y) for y in z] for z in (params, moves))
        move(params, moves, group.lr, group.weight_decay, finite)
    return Outputs(leaves, shared, skipped, clean)


def _mover(x: Inputs) -> Callable[[Sequence[Tensor], Sequence[Tensor]], None]:
    """Updates some of the parameters in place, each as its group says."""
    of = {id(x.params[k]): i for i, group in enumerate(x.groups) for k in group.keys}

    def then(params: Sequence[Tensor], deltas: Sequence[Tensor]) -> None:
        by_group: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for p, delta in zip(params, deltas, strict=True):
            by_group.setdefault(of[id(p)], []).append((p, delta))
        for i, pairs in by_group.items():
            own, moves = ([pair[j] for pair in pairs] for j in (0, 1))
            move(own, moves, x.groups[i].lr, x.groups[i].weight_decay)

    return then


def all_finite(grads: Sequence[Any], loss: Tensor | None, sharded: Tree = ()) -> Tensor:
    """Whether no element is infinite or NaN, as a scalar tensor.

    Args:
        grads: at least one tensor.
        loss: a scalar that must be finite too.
        sharded: the parameters, where any is a DTensor: then on no process.
    """
    own = [_sharded.local(x) for x in grads]
    some = [x for x in own if x.numel()]
    if loss is not None:
        some.append(loss)
    flag = torch.ones((), dtype=torch.bool, device=grads[0].device)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for x in torch._foreach_norm(some, ord=float("inf")) if some else ():
        by_dtype.setdefault(x.dtype, []).append(x)
    for largest in by_dtype.values():
        flag = flag & torch.stack(largest).isfinite().all()
    return _sharded.everywhere(flag, sharded)


def _plain(optimizer: Optimizer, *args: Any, **kwargs: Any) -> tuple[Tree, Any]:
    return optimizer.update(*args, **kwargs)


def _consuming(optimizer: Optimizer, *args: Any, **kwargs: Any) -> tuple[Tree, Any]:
    return consuming_update(optimizer)(*args, **kwargs)


def _negated(grads: Any, keys: Sequence[Any]) -> Any:
    new: Any = dict(grads) if isinstance(grads, dict) else list(grads)
    for k, x in zip(keys, torch._foreach_neg([grads[k] for k in keys]), strict=True):
        new[k] = x
    return new


def _where(finite: Tensor, new: Tree, old: Tree) -> Tree:
    return trees.map(
        lambda n, o: torch.where(finite, n, o) if isinstance(n, Tensor) else n, new, old
    )
