"""Finds what a recomputed function must not do: close over a traced tensor, draw random numbers.

A function that is recomputed in the backward pass runs below all transforms, on the tensors that
were passed to it. One that it merely closes over would there be a constant: a gradient of zero,
silently. So the function is run once more, on plain stand-ins of its arguments; any operation that
then meets a tensor of an outer transform has got it by closure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import TorchFunctionMode

from fmeta import _autodiff, trees

__all__ = ["refuse_closures_and_noise"]

_functorch = torch._C._functorch

# Reading these is not using a tensor's values ("__get__" is any property, such as .shape).
_METADATA = {"__get__", "__set__", "size", "dim", "numel", "stride", "is_floating_point"}
_METADATA |= {
    "is_inference",
    "is_complex",
    "__len__",
    "element_size",
    "get_device",
    "untyped_storage",
}


_NOISE = (
    "the function draws random numbers (dropout?), and recomputing it would draw others: draw the "
    "noise outside and pass it in as data (a part of the batch), put the module into eval mode, or "
    "use checkpoint=None"
)


def refuse_closures_and_noise(fn: Callable[..., Any], *args: Any, cure: str) -> None:
    """Runs ``fn`` once on untraced stand-ins of ``args`` and raises on what it must not do.

    Args:
        fn: the function that will be recomputed.
        *args: trees of tensors.
        cure: how to pass a tensor explicitly, for the message.

    Raises:
        ValueError: when ``fn`` uses a closed-over tensor that is being differentiated or batched,
            or draws random numbers.
    """
    if torch.compiler.is_compiling():  # the tracer sees closures by itself
        return
    standins = trees.map(lambda x: _untraced(x) if isinstance(x, Tensor) else x, args)
    before = _random_state()
    recording = torch.is_grad_enabled()
    with torch.no_grad(), _Refuse(cure, recording), _autodiff.nested():
        fn(*standins)
    after = _random_state()
    if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        _restore_random_state(before)
        raise ValueError(_NOISE)


class _Refuse(TorchFunctionMode):
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
                    raise ValueError(
                        f"`{name}` uses a closed-over tensor of shape {tuple(x.shape)} that is "
                        "being differentiated or batched; recomputed, it would silently be a "
                        f"constant. Pass it explicitly: {self.cure}"
                    )
        return func(*args, **(kwargs or {}))

    def traced_outside(self, x: Tensor) -> bool:
        """Whether x carries a derivative or a batch dimension of a transform around the probe."""
        while True:
            wrapped = _functorch.is_functorch_wrapped_tensor(x)
            if _functorch.maybe_get_level(x) <= self.depth:
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


def _restore_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
