"""That all ranks hold the same, and how they get it from rank 0."""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fmeta import trees
from fmeta.distributed._ranks import Ranks

__all__ = ["broadcast_tree", "check_alike", "check_same"]

Tree = Any


def broadcast_tree(tree: Tree, ranks: Ranks) -> Tree:
    """Rank 0's tree of tensors and plain numbers.

    Args:
        tree: of one structure on all ranks; shapes and values of the others' do not matter, their
            tensors say the devices.
        ranks: who takes part.
    """
    if ranks.size == 1:
        return tree
    flat, spec = trees.flatten(tree)
    data = numbers = b""
    if ranks.is_first:
        # Each of its own: two leaves may share memory, which the format refuses.
        tensors = {str(i): x.cpu().clone() for i, x in enumerate(flat) if isinstance(x, Tensor)}
        data = safetensors.torch.save({k: x.contiguous() for k, x in tensors.items()})
        plain = {i: x for i, x in enumerate(flat) if not isinstance(x, Tensor)}
        numbers = json.dumps(plain).encode()
    found = safetensors.torch.load(ranks.broadcast_bytes(data))
    plain = json.loads(ranks.broadcast_bytes(numbers))
    leaves = [
        found[str(i)].to(x.device) if isinstance(x, Tensor) else plain[str(i)]
        for i, x in enumerate(flat)
    ]
    return trees.unflatten(spec, leaves)


def check_same(tree: Tree, ranks: Ranks, what: str) -> None:
    """Raises a ValueError when a rank holds other tensors or numbers than rank 0, bit for bit.

    Args:
        tree: of tensors and plain values.
        ranks: who takes part; they exchange a number each.
        what: the name of the tree in the message.
    """
    if ranks.size == 1:
        return
    sums = ranks.gather(torch.tensor([_checksum(tree)]), [1] * ranks.size).tolist()
    others = [rank for rank, found in enumerate(sums) if found != sums[0]]
    if others:
        raise ValueError(
            f"rank {others[0]} of {ranks.size} has {what} that differ from rank 0's: give all "
            "ranks the same arguments, with seeds of their own nowhere; on machines of different "
            "kinds results may differ in the last bits, which several ranks do not allow"
        )


def check_alike(tree: Tree, ranks: Ranks, what: str) -> None:
    """Raises a ValueError on every rank when a tree is not built alike on all.

    Args:
        tree: of tensors, which may differ in their values, and of other leaves.
        ranks: who takes part; they exchange 8 bytes each, and where they differ what they have.
        what: the name of the tree in the message.
    """
    if ranks.size == 1:
        return
    leaves = dict(zip(trees.paths(tree), map(_kind, trees.leaves(tree)), strict=True))
    written = json.dumps(list(leaves.items())).encode()
    short = hashlib.blake2b(written, digest_size=8).digest()
    row = torch.frombuffer(bytearray(short), dtype=torch.uint8)[None]
    ones = [1] * ranks.size
    rows = ranks.gather(row, ones)
    others = [rank for rank in range(ranks.size) if not rows[rank].equal(rows[0])]
    if not others:
        return
    lengths = ranks.gather(torch.tensor([len(written)]), ones).tolist()
    row = torch.zeros(1, max(lengths), dtype=torch.uint8)
    row[0, : len(written)] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    texts = ranks.gather(row, ones)
    first, other = (
        dict(json.loads(texts[r, : lengths[r]].numpy().tobytes())) for r in (0, others[0])
    )
    path = next(
        (p for p in (*first, *other) if first.get(p) != other.get(p)), next(iter(first), "")
    )
    raise ValueError(
        f"{what} are not alike on all ranks: at path {path} rank {others[0]} of {ranks.size} has "
        f"{other.get(path, 'no leaf')}, rank 0 has {first.get(path, 'no leaf')}; give trees of "
        "the same paths, shapes and dtypes on all ranks, on devices of one kind"
    )


def _kind(x: Any) -> str:
    if not isinstance(x, Tensor):
        return "None" if x is None else f"a {type(x).__name__}"
    return f"{x.dtype} {tuple(x.shape)} on {x.device.type}"


def _checksum(tree: Tree) -> int:
    found = 0
    for path, x in zip(trees.paths(tree), trees.leaves(tree), strict=True):
        text = f"{path} {x if not isinstance(x, Tensor) else tuple(x.shape)}"
        found = zlib.crc32(text.encode(), found)
        if isinstance(x, Tensor):
            data = x.detach().cpu().reshape(-1).clone().view(torch.uint8)
            found = zlib.crc32(data.numpy().tobytes(), found)
    return found
