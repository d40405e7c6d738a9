"""What of a step `torch.compile` may look into, with types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["kept_out", "looked_through"]

F = TypeVar("F", bound=Callable[..., Any])


def kept_out(fn: F) -> F:
    """``fn`` and all that it calls run as they are, also within `torch.compile`."""
    return torch.compiler.disable(fn)


def looked_through(fn: F) -> F:
    """``fn`` runs as it is, but what it calls may be compiled."""
    return torch.compiler.disable(fn, recursive=False)
