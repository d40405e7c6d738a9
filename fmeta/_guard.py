"""Finds what a recomputed function must not do: close over a traced tensor, draw random numbers.

A function that is recomputed in the backward pass runs below all transforms, on the tensors that
were passed to it. One that it merely closes over would there be a constant: a gradient of zero,
silently. So the function is run once more, on plain stand-ins of its arguments; any operation that
then meets a tensor of an outer transform has got it by closure.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fmeta import _autodiff, trees

__all__ = ["drawn", "probing", "refuse_changing_numbers", "refuse_closures_and_noise"]

_functorch = torch._C._functorch
_probing: ContextVar[bool] = ContextVar("_probing", default=False)

_NOISE = (
    "the function draws random numbers (dropout?), and recomputing it would draw others: draw the "
    "noise outside and pass it in as data (a part of the batch), put the module into eval mode, or "
    "use checkpoint=None"
)
# Reading these is not using a tensor's values ("__get__" is any property, such as .shape).
_METADATA = {"__get__", "__set__", "size", "dim", "numel", "stride", "is_floating_point"}
_METADATA |= {"is_inference", "is_complex", "__len__", "element_size", "get_device"}
_METADATA |= {"untyped_storage"}
# Of a tensor without a batch dimension, these read shape, dtype and device only.
_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like"}
_LIKE |= {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}


def refuse_closures_and_noise(fn: Callable[..., Any], *args: Any, cure: str) -> None:
    """Runs ``fn`` once on untraced stand-ins of ``args`` and raises on what it must not do.

    It sees what the function does with these arguments: what it does only in later calls (by a
    counter of its own, say) stays unseen. Generators other than those of torch, NumPy and Python's
    `random` are not watched either.

    Args:
        fn: the function that will be recomputed.
        *args: trees of tensors; numbers among them may not change.
        cure: how to pass a tensor explicitly, for the message.

    Raises:
        ValueError: when ``fn`` uses or returns a closed-over tensor that is being differentiated or
            batched, or draws random numbers.
        TypeError: when a number in its first argument comes back changed.
    """
    if torch.compiler.is_compiling():  # the tracer sees closures by itself
        return
    standins = trees.map(lambda x: _untraced(x) if isinstance(x, Tensor) else x, args)
    before, other_before = _random_state(), _other_random_state()
    refuse = _Refuse(cure, torch.is_grad_enabled())
    noise = _SeesNoise()
    token = _probing.set(True)
    try:
        with torch.no_grad(), refuse, noise, _autodiff.nested():
            result = fn(*standins)
    finally:
        _probing.reset(token)
    for x in trees.leaves(result):
        if isinstance(x, Tensor) and refuse.traced_outside(x):
            refuse.complain("the function returns", x)
    changed = not _all_equal(before, _random_state())
    # Another thread may draw from the global generator at the same time: that is not our noise.
    if changed and noise.seen:
        _restore_random_state(before)
        raise ValueError(_NOISE)
    if _other_random_state() != other_before:
        raise ValueError(_NOISE)


def drawn(fn: Callable[[], Any], *, closely: bool = False) -> tuple[Any, bool]:
    """What ``fn()`` gives, and whether it drew random numbers.

    Only torch's global generators are watched, or ``closely``, and slower, every operation. Where
    it drew, their state is as it was before.
    """
    before, noise = _random_state(), _SeesNoise()
    with noise if closely else nullcontext():
        result = fn()
    if _all_equal(before, _random_state()):
        return result, noise.seen
    if not closely:  # another thread may have drawn: once more, now looking
        with noise:
            fn()
    if noise.seen:
        _restore_random_state(before)
    return result, noise.seen


def probing() -> bool:
    """Whether a function is being run on stand-ins, to see what it does.

    Then what the probe is to look into must not hide in an `autograd.Function`: under a transform
    torch runs that as one operation, at whose insides no mode looks.
    """
    return not torch.compiler.is_compiling() and _probing.get()


def refuse_changing_numbers(carry: Any, new: Any) -> None:
    """Raises a TypeError when a carry's Python number is another after a step."""
    for path, a, b in zip(trees.paths(carry), trees.leaves(carry), trees.leaves(new), strict=True):
        if not isinstance(a, Tensor) and not isinstance(b, Tensor) and a is not b and a != b:
            raise TypeError(
                f"the carry at path {path} is {a!r} before a step and {b!r} after it: under "
                "checkpoint what changes must be a tensor (a count: torch.zeros((), "
                "dtype=torch.int64))"
            )


class _SeesNoise(TorchDispatchMode):
    """Notes whether an operation that draws random numbers was run, in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen = True
        return func(*args, **(kwargs or {}))


class _Refuse(TorchFunctionMode):
    """Raises when an operation meets a tensor of a transform around the probe."""

    def __init__(self, cure: str, recording: bool) -> None:
        super().__init__()
        self.cure = cure
        # Under no_grad nothing below the transforms is being differentiated.
        self.recording = recording
        self.depth = _functorch.get_dynamic_layer_stack_depth()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _METADATA:
            for x in trees.leaves((args, kwargs)):
                if isinstance(x, torch.Generator):  # the global one shows by its state
                    raise ValueError(_NOISE)
                if isinstance(x, Tensor) and self.traced_outside(x):
                    if name in _LIKE and not _functorch.is_batchedtensor(x):
                        continue
                    self.complain(f"`{name}` uses", x)
        return func(*args, **(kwargs or {}))

    def complain(self, what: str, x: Tensor) -> None:
        raise ValueError(
            f"{what} a closed-over tensor of shape {tuple(x.shape)} that is being differentiated "
            "or batched; recomputed, it would silently be a constant. Pass it explicitly: "
            f"{self.cure}. Parameters of a module that are not being learned: "
            "module.requires_grad_(False)"
        )

    def traced_outside(self, x: Tensor) -> bool:
        """Whether x carries a derivative or a batch dimension of a transform around the probe."""
        while True:
            wrapped = _functorch.is_functorch_wrapped_tensor(x)
            # -2 is a transform that is over: torch.func.vjp, whose second half is still to come.
            if _functorch.maybe_get_level(x) <= self.depth and _functorch.maybe_get_level(x) != -2:
                if _functorch.is_batchedtensor(x):
                    return True
                if x.requires_grad and (wrapped or self.recording):
                    return True
                if _has_tangent(x):
                    return True
            if not wrapped:
                return False
            x = _functorch.get_unwrapped(x)


def _has_tangent(x: Tensor) -> bool:
    if not x.is_floating_point() or torch.autograd.forward_ad._current_level < 0:
        return False
    return unpack_dual(x, level=0).tangent is not None


def _untraced(x: Tensor) -> Tensor:
    """The plain tensor below all wrappers; of a batch, its first member."""
    while _functorch.is_functorch_wrapped_tensor(x):
        inner = _functorch.get_unwrapped(x)
        if _functorch.is_batchedtensor(x):
            inner = inner.select(_functorch.maybe_get_bdim(x), 0)
        x = inner
    return x.detach()


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _all_equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _other_random_state() -> tuple[Any, ...]:
    state: Any = numpy.random.get_state()
    return random.getstate(), state[1].tobytes(), *state[2:]


def _restore_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
