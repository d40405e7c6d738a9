"""The type of a schedule: a function of time that says whether it needs the horizon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta._numbers import check_number

__all__ = ["Schedule", "as_schedule", "check_length", "lasting", "on_device", "progress"]


class Schedule:
    """``schedule(t, num_steps) -> factor``, a pure function of tensors.

    Args:
        factor: ``factor(t, num_steps)``, elementwise in both; ``num_steps`` may be None.
        needs: ``{"num_steps"}`` when it cannot do without the horizon; `fmeta.scheduled` reads it.

    Example:
        >>> half = Schedule(lambda t, num_steps: 0.5 ** (t / 10))
        >>> half(torch.tensor([0, 10, 20]))
        tensor([1.0000, 0.5000, 0.2500])
    """

    __slots__ = ("factor", "needs")

    def __init__(
        self, factor: Callable[[Tensor, Any], Any], needs: frozenset[str] = frozenset()
    ) -> None:
        self.factor, self.needs = factor, needs

    def __call__(self, t: Any, num_steps: Any = None) -> Tensor:
        """The factor of the update before which there were ``t``.

        Args:
            t: a number, or a tensor of any shape (a whole curve at once).
            num_steps: the horizon: a number, a tensor that broadcasts with ``t``, or None.

        Returns:
            A floating tensor of the shape of ``t``.

        Raises:
            ValueError: when there is no horizon and the schedule needs one.
        """
        t = torch.as_tensor(t)
        if not t.is_floating_point():
            t = t.to(torch.get_default_dtype())
        if num_steps is None and self.needs:
            raise ValueError(
                "this schedule lasts as long as the training and got no num_steps: call "
                "init_hidden(..., num_steps=...), or build the schedule with its own steps"
            )
        if isinstance(num_steps, Tensor):
            num_steps = num_steps.to(t.device, t.dtype)
        factor = self.factor(t, num_steps)
        return factor if isinstance(factor, Tensor) and factor.shape else factor + 0 * t


def as_schedule(value: Any) -> Schedule:
    """A schedule; a plain function of ``(t, num_steps)`` becomes one."""
    if isinstance(value, Schedule):
        return value
    if not callable(value):
        raise TypeError(
            f"a schedule is a function of (t, num_steps), got {value!r}: for a number give "
            "fmeta.schedules.constant(number)"
        )
    return Schedule(value)


def check_length(name: str, value: Any) -> None:
    """Raises unless ``value`` is a positive number or a tensor (of any dtype)."""
    if not isinstance(value, Tensor):
        check_number(name, value, positive=True)


def lasting(steps: Any, factor: Callable[[Tensor, Any], Tensor]) -> Schedule:
    """The schedule ``factor(t, length)``, whose length is ``steps`` or, where None, the horizon."""
    if steps is None:
        return Schedule(factor, frozenset({"num_steps"}))
    check_length("steps", steps)
    return Schedule(lambda t, num_steps: factor(t, on_device(steps, t)))


def progress(t: Tensor, length: Any) -> Tensor:
    """The part of a length that is done, between 0 and 1.

    A length that is not positive (of what comes after a warm-up that outlasts the training) is
    done after one unit of time.
    """
    if isinstance(length, Tensor):
        length = torch.where(length > 0, length, 1)
    elif length <= 0:
        length = 1
    return (t / length).clamp(0, 1)


def on_device(value: Any, t: Tensor) -> Any:
    """A number as it is, a tensor on the device of ``t``."""
    return value.to(t.device) if isinstance(value, Tensor) else value
