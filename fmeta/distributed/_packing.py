"""Trees as one block of bytes, so that one exchange is enough whatever their dtypes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta import trees

__all__ = ["pack_rows", "unpack_rows"]

Tree = Any


def pack_rows(tree: Tree) -> Tensor:
    """All leaves side by side, byte for byte.

    Args:
        tree: of tensors ``(rows, ...)`` on one device.

    Returns:
        uint8 ``(rows, bytes)``.
    """
    return torch.cat([_bytes(x) for x in trees.leaves(tree)], 1)


def unpack_rows(block: Tensor, like: Tree) -> Tree:
    """What `pack_rows` packed, of any number of rows.

    Args:
        block: uint8 ``(rows, bytes)``.
        like: a tree of the same structure, dtypes and shapes but for the number of rows; its
            tensors say the devices.
    """
    flat, spec = trees.flatten(like)
    found, at = [], 0
    for x in flat:
        width = math.prod(x.shape[1:]) * x.element_size()
        # A copy, whose beginning is aligned for any dtype.
        part = block[:, at : at + width].clone(memory_format=torch.contiguous_format)
        part = part.view(x.dtype) if width else part.to(x.dtype)  # no bytes have no view
        found.append(part.reshape(len(block), *x.shape[1:]).to(x.device))
        at += width
    return trees.unflatten(spec, found)


def _bytes(x: Tensor) -> Tensor:
    rows = x.detach().reshape(len(x), math.prod(x.shape[1:]))
    # Not contiguous(), which leaves odd strides where there is one row.
    return rows.clone(memory_format=torch.contiguous_format).view(torch.uint8)
