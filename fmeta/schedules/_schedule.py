"""The type of a schedule: a function of time that says whether it needs the horizon."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fmeta._numbers import check_number

__all__ = [
    "Schedule",
    "as_schedule",
    "check_boundaries",
    "check_length",
    "lasting",
    "listed",
    "on_device",
    "progress",
]


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
    """Raises unless ``value`` is a number that is not negative, or a tensor (of any dtype)."""
    if not isinstance(value, Tensor):
        check_number(name, value)


def check_boundaries(values: Sequence[Any]) -> None:
    """Raises unless ``values`` are lengths that increase, as far as they can be known.

    Tensors are looked at where that waits for nothing: on a CPU, and not while they are traced.
    """
    known = []
    for value in values:
        if isinstance(value, Tensor) and not (value.numel() == 1 and _has_value(value)):
            continue
        known.append(value.item() if isinstance(value, Tensor) else value)
        check_length("boundaries", known[-1])
    if any(not a < b for a, b in itertools.pairwise(known)):
        raise ValueError(f"boundaries must increase, got {', '.join(f'{x:g}' for x in known)}")


def _has_value(x: Tensor) -> bool:
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    traced = torch.compiler.is_compiling() or get_proxy_mode() is not None
    return plain and not traced and not _functorch.is_functorch_wrapped_tensor(x)


def lasting(steps: Any, factor: Callable[[Tensor, Any], Tensor]) -> Schedule:
    """The schedule ``factor(t, length)``, whose length is ``steps`` or, where None, the horizon."""
    if steps is None:
        return Schedule(factor, frozenset({"num_steps"}))
    check_length("steps", steps)
    return Schedule(lambda t, num_steps: factor(t, on_device(steps, t)))


def progress(t: Tensor, length: Any) -> Tensor:
    """The part of a length that is done, between 0 and 1.

    A length that is not positive is done at once; values and derivatives are finite there too.
    """
    if isinstance(length, Tensor):
        done = (t / torch.where(length > 0, length, 1)).clamp(0, 1)
        return torch.where(length > 0, done, 1)
    return (t / length).clamp(0, 1) if length > 0 else torch.ones_like(t)


def on_device(value: Any, t: Tensor) -> Any:
    """A number as it is, a tensor on the device of ``t``."""
    return value.to(t.device) if isinstance(value, Tensor) else value


def listed(name: str, values: Any) -> list[Any]:
    """A sequence, or a tensor of one axis, as a list."""
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise ValueError(
                f"{name} must be a sequence or a tensor of one axis, got shape "
                f"{tuple(values.shape)}"
            )
        return list(values.unbind(0))
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence or a tensor, got {values!r}")
    return list(values)
