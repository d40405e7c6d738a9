"""The laws by name, and what a law does with an error that what it checks raises."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

__all__ = ["LAWS", "Law", "law", "of_law"]


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
            with of_law(name, "optimizer"):
                check(optimizer, params, **setup)

        LAWS[name] = Law(wrapped, needs_hidden, once)
        return wrapped

    return register


@contextmanager
def of_law(name: str, checked: str, where: str = "") -> Iterator[None]:
    """Makes every error an AssertionError that begins with the law's name, and ends with where.

    Args:
        name: of the law.
        checked: what it checks, whose errors these are.
        where: put after the message.
    """
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"law {name}: {error}{where}") from error.__cause__
    except Exception as error:
        raise AssertionError(
            f"law {name}: the {checked} raised {type(error).__name__}: {error}{where}"
        ) from error
