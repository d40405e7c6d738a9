"""Freed memory that stays with the process, for loops whose every step needs it again."""

from __future__ import annotations

import functools

import torch

__all__ = ["keep_freed_memory"]

# The largest block from which the C library learns (DEFAULT_MMAP_THRESHOLD_MAX of glibc), almost.
_BLOCK = 2**25 - 2**16


@functools.cache
def keep_freed_memory() -> None:
    """Lets glibc keep up to 64 MiB of freed memory, once a process; without effect elsewhere.

    It hands freed memory back to the system above a threshold of twice the largest block that it
    has seen freed (up to 32 MiB), and the system clears every page that it gives out anew. Steps
    with temporaries of some MiB spent up to half of their time on that. So a block of almost that
    size is freed; as nothing is written to it, it costs nothing.
    """
    torch.empty(_BLOCK, dtype=torch.uint8, device="cpu")
