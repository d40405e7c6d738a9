"""The laws by name, and what a law does with an error that the optimizer raises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["LAWS", "Law", "law"]


class Law(NamedTuple):
    """A law and how `check_optimizer` runs it.

    Attributes:
        check: ``check(optimizer, params, **setup) -> None``; AssertionError when it does not hold.
        needs_hidden: only for hidden states of type `fmeta.Hidden`.
        once: costly, so run on the first tree only.
    """

    check: Callable[..., None]
    needs_hidden: bool
    once: bool


LAWS: dict[str, Law] = {}


def law(
    *, needs_hidden: bool = False, once: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a law; whatever the optimizer raises in it becomes an AssertionError."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        name = check.__name__

        @functools.wraps(check)
        def wrapped(optimizer: Any, params: Any, **setup: Any) -> None:
            try:
                check(optimizer, params, **setup)
            except AssertionError as error:
                raise AssertionError(f"law {name}: {error}") from error.__cause__
            except Exception as error:
                raise AssertionError(
                    f"law {name}: the optimizer raised {type(error).__name__}: {error}"
                ) from error

        LAWS[name] = Law(wrapped, needs_hidden, once)
        return wrapped

    return register
