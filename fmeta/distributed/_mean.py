"""The mean of a tree over processes, for meta-training loops of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._numbers import check_real
from fmeta.distributed._agree import check_alike
from fmeta.distributed._ranks import Ranks, check_ranks

__all__ = ["all_reduce_mean", "sum_tree"]

Tree = Any


def all_reduce_mean(tree: Tree, *, weight: float = 1.0, ranks: Ranks | None = None) -> Tree:
    """The mean of a meta-gradient over all processes, the same on each.

    ``sum_r weight_r * tree_r / sum_r weight_r`` over ranks r. One all-reduce for each dtype, after
    an exchange of 8 bytes by which all know that their trees are alike.

    Args:
        tree: of floating tensors, of one structure on all ranks; ``None`` stays where it stands.
        weight: of this rank, the number of tasks that its mean is over. With 0 its tensors are not
            looked at; when all are 0 the mean is NaN.
        ranks: who takes part; default the processes of `torch.distributed` where it is
            initialised, else this one alone.

    Returns:
        A tree of the same dtypes; half precision is summed in float32.

    Raises:
        RankLost: another process ended.
        ValueError: a weight below 0; on every rank, trees that differ between ranks in their paths,
            shapes or dtypes (with the path of the leaf).
        TypeError: a leaf that is no floating tensor, a weight that is no number, no `Ranks`.

    Example:
        >>> grads = {"w": torch.ones(2), "frozen": None}
        >>> all_reduce_mean(grads, weight=4)["w"]
        tensor([1., 1.])
    """
    check_ranks(ranks)
    check_real(weight=weight)
    if not weight >= 0:
        raise ValueError(f"weight must be at least 0, got {weight}: give the number of tasks")
    if ranks is None:
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = Ranks.of_group() if started else Ranks.alone()
    check_alike(tree, ranks, "trees of which the mean is taken")
    for path, x in zip(trees.paths(tree), trees.leaves(tree), strict=True):
        if x is not None and not (isinstance(x, Tensor) and x.is_floating_point()):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"the leaf at path {path} is {kind}, not a floating tensor or None")

    def weighed(x: Any) -> Any:
        if x is None:
            return None
        wide = x.detach().to(trees.compute_dtype(x))
        return weight * wide if weight else torch.zeros_like(wide)  # not 0 * NaN

    total, norm = sum_tree((trees.map(weighed, tree), torch.tensor(float(weight)).double()), ranks)
    return trees.map(lambda s, x: None if x is None else (s / norm.to(s)).to(x.dtype), total, tree)


def sum_tree(tree: Tree, ranks: Ranks) -> Tree:
    """The sum over ranks, leaf by leaf; one exchange for each dtype (and device)."""
    if ranks.size == 1:
        return tree
    flat, spec = trees.flatten(tree)
    found = list(flat)
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(flat):
        if x is not None:
            kinds.setdefault((str(x.dtype), x.device.type), []).append(i)
    for _, places in sorted(kinds.items()):
        summed = ranks.sum(torch.cat([flat[i].detach().flatten() for i in places]))
        parts = summed.split([flat[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            found[i] = part.reshape(flat[i].shape)
    return trees.unflatten(spec, found)
