"""Independent coordinates worked on a tile at a time, where no derivative is recorded.

What a rule makes of its coordinates on the way (the gates of an LSTM, say) is then as large as a
tile and stays in the cache, however large the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmeta import trees
from fmeta._autodiff import inside_transform

__all__ = ["in_tiles", "tile_of"]

# Numbers of the state of a tile: on a CPU it stays in the cache (measured on `lstm`: a quarter and
# four times as many are slower); elsewhere it keeps the device busy.
_IN_CACHE = 2**18
_ELSEWHERE = 2**25


def tile_of(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    others: Any = (),
) -> int | None:
    """Coordinates of a tile; None where the tensors may be observed, or would be one tile.

    Args:
        params, grads: of one dtype, of each leaf.
        states: entries ``(*leaf, *state)`` of each leaf.
        others: a tree of what else the rule reads.
    """
    every = [*params, *grads, *(x for state in states for x in state)]
    every += [x for x in trees.leaves(others) if isinstance(x, Tensor)]
    if inside_transform() or torch._C._len_torch_dispatch_stack():
        return None
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_meta for x in every):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in every):
        return None
    count = sum(x.numel() for x in params)
    each = max(sum(x.numel() for state in states for x in state) // max(count, 1), 1)
    size = (_IN_CACHE if params[0].device.type == "cpu" else _ELSEWHERE) // each
    return max(size, 1) if count > size else None


class _Leaf(NamedTuple):
    """One leaf, flat.

    Attributes:
        p, g, delta: ``(N,)``.
        old, new: entries of the state, ``(N, *state)``; may be the same memory.
    """

    p: Tensor
    g: Tensor
    delta: Tensor
    old: list[Tensor]
    new: list[Tensor]


def in_tiles(
    update: Callable[..., tuple[Tensor, Any]],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Any],
    size: int,
    own: bool,
) -> tuple[list[Tensor], list[Any]] | None:
    """Delta and new state of each leaf; None, and nothing is done, if the state changes its form.

    Args:
        update: ``(param: (N,), grad: (N,), hidden) -> (delta: (N,), hidden)``.
        states: of each leaf, with entries ``(*leaf, *state)``.
        size: coordinates of a tile.
        own: whether the memory of the states may be used for the new ones.
    """
    spec = trees.flatten(states[0])[1]
    if not _of_one_kind(params, states):
        return None  # a tile of some leaves would not tell what becomes of the others
    leaves = [_leaf(*row, own) for row in zip(params, grads, states, strict=True)]
    memory = {x.untyped_storage().data_ptr() for leaf in leaves for x in leaf.old}
    for tile in _tiles([len(leaf.p) for leaf in leaves], size):
        parts = [_part(leaves[i], at, n) for i, at, n in tile]
        old = [_joined(column) for column in zip(*(part.old for part in parts), strict=True)]
        p, g = _joined([part.p for part in parts]), _joined([part.g for part in parts])
        delta, state = update(p, g, trees.unflatten(spec, old))
        found, new_spec = trees.flatten(state)
        if new_spec != spec or not all(map(_alike, old, found)):
            return None  # already at the first tile
        found = [x.clone() if x.untyped_storage().data_ptr() in memory else x for x in found]
        sizes = [n for *_, n in tile]
        _scatter(delta, [part.delta for part in parts], sizes)
        for x, *outs in zip(found, *(part.new for part in parts), strict=True):
            _scatter(x, outs, sizes)
    deltas = [leaf.delta.view(p.shape) for leaf, p in zip(leaves, params, strict=True)]
    new = []
    for leaf, p, state in zip(leaves, params, states, strict=True):
        pairs = zip(leaf.new, trees.leaves(state), strict=True)
        new.append(
            trees.unflatten(spec, [x.view((*p.shape, *y.shape[p.ndim :])) for x, y in pairs])
        )
    return deltas, new


def _of_one_kind(params: Sequence[Tensor], states: Sequence[Any]) -> bool:
    """Whether the state of a coordinate has the same entries, shapes and dtypes in all leaves."""
    found = set()
    for p, state in zip(params, states, strict=True):
        flat, spec = trees.flatten(state)
        found.add((spec, tuple((x.dtype, x.shape[p.ndim :]) for x in flat)))
    return len(found) == 1


def _leaf(p: Tensor, g: Tensor, state: Any, own: bool) -> _Leaf:
    given = trees.leaves(state)
    old = [x.reshape(p.numel(), *x.shape[p.ndim :]) for x in given]
    kept = [own and x.data_ptr() == y.data_ptr() for x, y in zip(old, given, strict=True)]
    new = [x if k else torch.empty_like(x) for x, k in zip(old, kept, strict=True)]
    flat = p.detach().reshape(-1)
    return _Leaf(flat, g.detach().reshape(-1), torch.empty_like(flat), old, new)


def _part(leaf: _Leaf, at: int, n: int) -> _Leaf:
    p, g, delta = (x.narrow(0, at, n) for x in leaf[:3])
    old, new = ([x.narrow(0, at, n) for x in xs] for xs in leaf[3:])
    return _Leaf(p, g, delta, old, new)


def _tiles(counts: Sequence[int], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """``(leaf, start, length)`` of what goes together."""
    tile: list[tuple[int, int, int]] = []
    left = size
    for i, count in enumerate(counts):
        at = 0
        while at < count:
            n = min(left, count - at)
            tile.append((i, at, n))
            at, left = at + n, left - n
            if not left:
                yield tile
                tile, left = [], size
    if tile:
        yield tile


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _alike(old: Tensor, new: Any) -> bool:
    same = isinstance(new, Tensor) and new.dtype == old.dtype and new.device == old.device
    return same and new.shape == old.shape


def _scatter(x: Tensor, outs: Sequence[Tensor], sizes: Sequence[int]) -> None:
    for part, out in zip(x.split(list(sizes)), outs, strict=True):
        out.copy_(part)
