"""Functions that a user gives to a builder, checked as it is called."""

from __future__ import annotations

import inspect
import sys
from typing import Any

__all__ = ["check_function"]

# Modules whose functions are builders: easily given themselves in place of what they build.
_OF_BUILDERS = ("fmeta.estimators.meta_losses", "fmeta.estimators._horizons")


def check_function(name: str, fn: Any, *arguments: str, keywords: tuple[str, ...] = ()) -> None:
    """Raises a TypeError unless ``fn`` can be called with so many arguments.

    Args:
        name: of the argument that it is given as.
        fn: what was given. Where its arguments cannot be known (of C) it is left at its word.
        *arguments: what it is called with, by position.
        keywords: the same by name.
    """
    called = f"{name}({', '.join([*arguments, *(f'{key}=' for key in keywords)])})"
    if not callable(fn):
        raise TypeError(f"{name} must be a function, called as {called}, got {fn!r}")
    if _is_builder(fn):
        raise TypeError(
            f"{name} is the builder {fn.__name__} itself, not what it builds: call it, as "
            f"{name}={fn.__name__}({', '.join(_required(fn))})"
        )
    try:  # a wrapper's own arguments: it may give others to what it wraps
        signature = inspect.signature(fn, follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError:
        takes = str(signature).split(" -> ")[0]
        raise TypeError(
            f"{name} is called as {called}, but what was given takes {takes}: let it take these"
        ) from None


def _is_builder(fn: Any) -> bool:
    if not inspect.isfunction(fn) or fn.__module__ not in _OF_BUILDERS:
        return False
    return getattr(sys.modules[fn.__module__], fn.__name__, None) is fn


def _required(fn: Any) -> list[str]:
    parameters = inspect.signature(fn).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]
