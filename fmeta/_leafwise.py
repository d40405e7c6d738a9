"""Marks an update that treats every leaf by itself, so that a few leaves may go at a time.

Given ``None`` as the gradient of all other leaves, a marked ``update`` changes the leaves that are
left exactly as it does among all of them, and passes ``hidden.shared`` on. The lifts mark theirs;
an update without the mark may look at the whole tree (`treewise`, `clip_by_global_norm`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["is_leafwise", "leafwise"]

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "treats_leaves_apart"


def leafwise(update: F) -> F:
    """Marks ``update``; a decorator."""
    setattr(update, _MARK, True)
    return update


def is_leafwise(optimizer: Any) -> bool:
    """Whether this optimizer's ``update`` carries the mark."""
    return getattr(optimizer.update, _MARK, False)
