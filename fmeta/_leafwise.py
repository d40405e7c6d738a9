"""What an update says of itself beyond its signature, for those who call it at the edge.

An update may be marked as one that treats every leaf by itself, so that a few leaves may go at a
time.

Given ``None`` as the gradient of all other leaves, a marked ``update`` changes the leaves that are
left exactly as it does among all of them, and passes ``hidden.shared`` on. The lifts mark theirs;
an update without the mark may look at the whole tree (`treewise`, `clip_by_global_norm`).

An update may also have a form that consumes the hidden state: same arguments and results, but the
memory of the given state may hold the new one. Only a caller that owns the state and never looks
at it again may use it (`fmeta.torch_optim`). Combinators have no such form, even of a rule that
has: they may need the old state. Such a form may hand deltas on one group of leaves after the
other, so that those of a whole model need not be in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = [
    "applied_as_is",
    "consuming",
    "consuming_update",
    "hands_deltas_on",
    "is_applied_as_is",
    "is_leafwise",
    "is_transform",
    "leafwise",
    "refuse_scaling",
    "transforms_gradients",
]

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "treats_leaves_apart"
_CONSUMING = "consumes_hidden"
_HANDS_ON = "hands_deltas_on"
_AS_IS = "applied_as_is"
_TRANSFORM = "transforms_gradients"


def leafwise(update: F) -> F:
    """Marks ``update``; a decorator."""
    setattr(update, _MARK, True)
    return update


def is_leafwise(optimizer: Any) -> bool:
    """Whether this optimizer's ``update`` carries the mark."""
    return getattr(optimizer.update, _MARK, False)


def consuming(
    update: Callable[..., Any], other: Callable[..., Any], *, hands_on: bool = False
) -> None:
    """Says that ``other`` does what ``update`` does and consumes the hidden state.

    Args:
        hands_on: whether it also takes ``then``, which it calls with some leaves' parameters and
            deltas once these are known, and never looks at the parameters again; in what it
            returns their deltas are None.
    """
    setattr(update, _CONSUMING, other)
    setattr(update, _HANDS_ON, hands_on)


def consuming_update(optimizer: Any) -> Callable[..., Any]:
    """The form of ``update`` that consumes the hidden state, or ``update`` itself."""
    return getattr(optimizer.update, _CONSUMING, optimizer.update)


def hands_deltas_on(optimizer: Any) -> bool:
    """Whether the form that consumes the hidden state takes ``then``."""
    return getattr(optimizer.update, _HANDS_ON, False)


def applied_as_is(update: Callable[..., Any], *inner: Any) -> None:
    """Says that the deltas must not be scaled: always, or if those of one of ``inner``."""
    if not inner or any(map(is_applied_as_is, inner)):
        setattr(update, _AS_IS, True)


def is_applied_as_is(optimizer: Any) -> bool:
    """Whether this optimizer's deltas must be applied as they are."""
    return getattr(optimizer.update, _AS_IS, False)


def transforms_gradients(update: Callable[..., Any]) -> None:
    """Says that the deltas are gradients for the next one in a `chain`."""
    setattr(update, _TRANSFORM, True)


def is_transform(optimizer: Any) -> bool:
    """Whether this optimizer's deltas are gradients, along which parameters would climb."""
    return getattr(optimizer.update, _TRANSFORM, False)


def refuse_scaling(optimizer: Any, what: str) -> None:
    """Raises a ValueError when ``what`` would change deltas that must be applied as they are."""
    if is_applied_as_is(optimizer):
        raise ValueError(
            f"{what} changes the deltas of a rule whose state follows the parameters "
            "(master_weights, lookahead, schedule_free_adamw): put it inside, as in "
            "master_weights(scheduled(rule, schedule)), or give the rate to the rule itself"
        )
