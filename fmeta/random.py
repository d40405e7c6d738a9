"""Randomness: one generator for each use, made from a seed and integers."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["fold_in"]


def fold_in(seed: int, *ints: int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and every one of ``ints``, in order.

    The integers are hashed (BLAKE2b), so that neighbouring seeds, permuted integers and added
    zeros all give unrelated streams, and a draw does not depend on how the work around it is
    grouped or spread over processes. torch's CPU generator has 2**32 streams: among 100,000 draws
    about one pair has the same.

    Args:
        seed: the seed of the run, ``-2**63 <= seed < 2**63``.
        *ints: what the draw is for: outer step, task index, particle index, ... (same range).

    Returns:
        A `torch.Generator` on the CPU.

    Raises:
        TypeError: for anything but Python integers.

    Example:
        >>> a = torch.rand(2, generator=fold_in(0, 1, 2))
        >>> torch.equal(a, torch.rand(2, generator=fold_in(0, 1, 2)))
        True
        >>> torch.equal(a, torch.rand(2, generator=fold_in(0, 2, 1)))
        False
    """
    for value in (seed, *ints):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"fold_in takes Python integers, got {value!r}: use int(...)")
    try:
        key = b"".join(value.to_bytes(8, "little", signed=True) for value in (seed, *ints))
    except OverflowError:
        raise ValueError(f"fold_in takes integers of 64 bits, got {(seed, *ints)}") from None
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def own(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a new one seeded 0: `init` without one is deterministic."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"init takes a torch.Generator or None, got {generator!r}: for a seed give "
            "fmeta.random.fold_in(seed)"
        )
    return torch.Generator().manual_seed(0) if generator is None else generator
