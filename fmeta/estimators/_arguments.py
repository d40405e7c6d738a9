"""What all estimators are given: their arguments, seeds and states, checked before any work."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from fmeta import trees
from fmeta._functions import check_function
from fmeta._numbers import check_flag
from fmeta.distributed._ranks import check_ranks
from fmeta.estimators._contract import Estimator, check_sizes
from fmeta.optimizer import Optimizer, check_optimizer_type

__all__ = ["check_arguments", "check_estimator_type", "check_size", "check_state", "checked_seed"]

Check = Callable[[str, Any], None]


def check_arguments(optimizer: Optimizer, **given: Any) -> None:
    """Raises an error that names the argument and says what it should be.

    Args:
        optimizer: the rule.
        **given: arguments of estimators by their names; a ``meta_loss`` of whole trainings is
            ``meta_loss_of_run``.

    Raises:
        TypeError: what is no optimizer, flag, split, ranks or function, or a function that takes
            other arguments.
        ValueError: a size that is no integer above 0.
    """
    check_optimizer_type(optimizer, "optimizer")
    for name, value in given.items():
        _CHECKS[name](name, value)


def check_size(name: str, value: Any) -> None:
    """Raises a ValueError for what is no integer above 0, None included."""
    if value is None:
        raise ValueError(f"{name} must be an integer, got None")
    check_sizes(**{name: value})


def checked_seed(seed: Any) -> int:
    """The seed that ``init`` was given, as an integer.

    Raises:
        TypeError: it is none.
    """
    try:
        if not isinstance(seed, bool):
            return operator.index(seed)
    except TypeError:
        pass
    raise TypeError(f"seed must be an integer, got {seed!r}")


def check_estimator_type(value: Any) -> None:
    """Raises a TypeError that names the cure unless ``value`` is an `Estimator`."""
    if isinstance(value, Estimator):
        return
    cure = "build one with fmeta.estimators, or of two functions Estimator(init, estimate)"
    if inspect.isfunction(value):
        cure = f"call the builder: {value.__name__}(...)"
    raise TypeError(f"estimator must be an Estimator, got {type(value).__name__}: {cure}")


def check_state(
    state: Any, kind: type[Any], *, tasks: int | None = None, copies: int | None = None
) -> None:
    """Raises unless the state is one of this estimator.

    Args:
        state: what ``estimate`` was given.
        kind: class of this estimator's states.
        tasks, copies: leading dimensions of the trainings in it; None: it has none.

    Raises:
        TypeError: a state of another class.
        ValueError: trainings of other numbers.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"the state is of class {type(state).__name__}, but those of this estimator are "
            f"{kind.__name__}: {_CURE}"
        )
    if tasks is None:
        return
    first = trees.leaves(state.params)[0]
    if tuple(first.shape[:2]) != (tasks, copies):
        raise ValueError(
            f"the state has trainings of (tasks, copies) {tuple(first.shape[:2])}, but this "
            f"estimator makes {(tasks, copies)}: {_CURE}"
        )


_CURE = "give what its own init, or its last estimate, returned"


def _size_or_none(name: str, value: Any) -> None:
    check_sizes(**{name: value})


def _flag(name: str, value: Any) -> None:
    check_flag(**{name: value})


def _split(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(
            f'{name} must be the name of a split, as "validation", or None, got {value!r}'
        )


def _ranks(name: str, value: Any) -> None:
    check_ranks(value)


def _function(*arguments: str) -> Check:
    def check(name: str, value: Any) -> None:
        if value is not None:
            check_function(name, value, *arguments)

    return check


def _meta_loss(*arguments: str) -> Check:
    def check(name: str, value: Any) -> None:
        if value is not None:
            keywords = tuple(sorted(getattr(value, "needs", ())))
            check_function("meta_loss", value, *arguments, keywords=keywords)

    return check


_LOSS = _function("data", "config", "model_params", "batch", "meta_params")
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("horizon", "num_rollouts", "num_tasks", "truncation"), check_size),
    **dict.fromkeys(
        ("chunk_size", "inner_batches", "num_particles", "outer_batches"), _size_or_none
    ),
    **dict.fromkeys(("antithetic", "compile", "recurrent", "relative", "stagger", "trace"), _flag),
    "bind": _function("meta_params", "config"),
    "eval_split": _split,
    "inner_loss": _LOSS,
    "meta_loss": _meta_loss("losses", "eval_losses", "t", "horizon"),
    "meta_loss_of_run": _meta_loss("run"),
    "outer_loss": _LOSS,
    "perturb": _function("meta_params", "step", "particle"),
    "ranks": _ranks,
}
