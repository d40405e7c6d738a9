"""What changes in place: parameters, and the hidden state where its memory has to stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._stacks import share_no_memory
from fmeta.torch_optim import _sharded

__all__ = ["apart", "move", "overlap", "write"]

Tree = Any


def move(
    params: list[Tensor],
    delta: list[Tensor],
    lr: Any,
    weight_decay: Any,
    finite: Tensor | None = None,
) -> None:
    """``p += lr * delta - lr * weight_decay * p``, in the compute dtype, cast once.

    With ``finite`` False (a scalar tensor) the parameters stay as they are, bit for bit.
    """
    if finite is not None:
        moved = [p.clone() for p in params]
        move(moved, delta, lr, weight_decay)
        torch._foreach_copy_(
            params, [torch.where(finite, m, p) for m, p in zip(moved, params, strict=True)]
        )
        return
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    kept = 1 - lr * weight_decay if decays else 1.0
    full: list[int] = []
    low: list[int] = []
    for i, p in enumerate(params):
        (full if p.dtype is trees.compute_dtype(p) else low).append(i)
    if full:
        own, change = params, delta
        if low:
            own, change = [params[i] for i in full], [delta[i] for i in full]
        change = [
            d if d.dtype is p.dtype else d.to(p.dtype) for p, d in zip(own, change, strict=True)
        ]
        if decays:
            torch._foreach_mul_(own, kept)
        if isinstance(lr, Tensor):
            torch._foreach_add_(own, torch._foreach_mul(change, lr))
        else:
            torch._foreach_add_(own, change, alpha=lr)
    if low:
        own = [params[i] for i in low]
        dtypes = [trees.compute_dtype(p) for p in own]
        wide = [p.to(t) for p, t in zip(own, dtypes, strict=True)]
        change = [delta[i].to(t) for i, t in zip(low, dtypes, strict=True)]
        if decays:
            torch._foreach_mul_(wide, kept)
        torch._foreach_add_(wide, torch._foreach_mul(change, lr))
        torch._foreach_copy_(own, wide)


def write(
    olds: Sequence[Tree], news: Sequence[Tree], deltas: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Copies new states into the memory of the old ones; returns the deltas, apart from it.

    An entry that takes the old value of another one is copied before that is overwritten.

    Args:
        olds, news: states, one for each parameter (or the whole model).
        deltas: its update, or None.
    """
    targets: list[Tensor] = []
    values: list[Tensor] = []
    kept: list[Tensor | None] = []
    for old, new, delta in zip(olds, news, deltas, strict=True):
        own = trees.leaves(old)
        for o, n in zip(own, trees.leaves(new), strict=True):
            if isinstance(o, Tensor) and o is not n:
                targets.append(_sharded.local(o))
                values.append(_sharded.local(_apart_from(own, n)))
        kept.append(None if delta is None else _apart_from(own, delta))
    if targets:
        torch._foreach_copy_(targets, values)
    return kept


def _apart_from(tensors: Sequence[Any], x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # where memory is not to be seen; a kernel makes no copy
        return x.clone()
    mine = _memory(x)
    return x.clone() if any(isinstance(o, Tensor) and _memory(o) == mine for o in tensors) else x


def apart(
    inputs: Sequence[Tensor], leaves: dict[Any, Any], shared: Tree
) -> tuple[dict[Any, Any], Tree, bool]:
    """The state with copies of what uses the memory of ``inputs``, and whether there was none.

    Parameters and gradients change in place; a rule may well return one of them as its state.
    """
    taken = {_memory(x) for x in inputs}
    clean = True

    def own(x: Any) -> Any:
        nonlocal clean
        if not isinstance(x, Tensor) or not x.numel() or _memory(x) not in taken:
            return x
        clean = False
        return x.clone()

    return trees.map(own, leaves), trees.map(own, shared), clean


def overlap(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether a parameter uses memory of another one, or of a gradient.

    Then all updates have to be known before one of them moves.
    """
    some = [p for p in params if p.numel()]
    taken = {_memory(p) for p in some}
    if any(g.numel() and _memory(g) in taken for g in grads):
        return True
    if len(taken) == len(some):
        return False
    return not share_no_memory(some)  # views of one memory, as those of a flat buffer are


def _memory(x: Tensor) -> Any:
    if x.device.type == "meta" or type(x) not in (Tensor, torch.nn.Parameter):
        return id(x)
    return (x.device, x.untyped_storage().data_ptr())
