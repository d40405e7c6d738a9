"""Normalisation layers written out, where torch's own have a wrong second derivative.

torch 2.13 differentiates layer, batch and instance normalisation wrongly where a gradient is taken
below a `vmap` and differentiated again outside of it: under `vmap` the backward pass of a layer is
made of its saved mean and deviation, which the outer derivative takes as constants. Errors are of
1e-3 to 1e-1 of the gradient, without a warning. `jacrev` takes its gradients below a `vmap` of its
own, and so its derivative is wrong anywhere. Sums and products have no such trouble.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["norms_written_out", "under_vmap"]

_functorch = torch._C._functorch


def norms_written_out(*, always: bool = False) -> AbstractContextManager[Any]:
    """A context in which gradients of normalisation layers can be differentiated again.

    It changes results by rounding, and does nothing where no `vmap` is active, unless ``always``:
    for forward passes whose backward pass is taken below a `vmap` later.
    """
    if torch.compiler.is_compiling() or not (always or under_vmap()):
        return nullcontext()
    return _WrittenOut()


def under_vmap() -> bool:
    """Whether a `vmap` is among the transforms that are active."""
    if _functorch.peek_interpreter_stack() is None:
        return False
    kinds = (i.key() for i in _functorch.get_interpreter_stack())
    return any(kind == _functorch.TransformType.Vmap for kind in kinds)


class _WrittenOut(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        written: Callable[..., Any] | None = _WRITTEN.get(func)
        kwargs = kwargs or {}
        return func(*args, **kwargs) if written is None else written(*args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    if tuple(input.shape[input.ndim - len(dims) :]) != tuple(normalized_shape):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # torch says what is wrong
    return _standardised(input, dims, weight, bias, eps)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    channels = input.shape[1] if input.ndim > 1 else 0
    if not training or running_mean is not None or input.numel() <= channels:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dims = (0, *range(2, input.ndim))
    return _standardised(input, dims, _of_channels(weight, input), _of_channels(bias, input), eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or running_mean is not None or input.ndim < 3:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    dims = tuple(range(2, input.ndim))
    return _standardised(input, dims, _of_channels(weight, input), _of_channels(bias, input), eps)


# Modules call the functions of nn.functional.
_WRITTEN: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}


def _standardised(
    x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # as torch's own does
    var, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    out = (wide - mean) * (var + eps).rsqrt()
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.to(x.dtype)


def _of_channels(p: Tensor | None, x: Tensor) -> Tensor | None:
    return None if p is None else p.reshape(-1, *(1,) * (x.ndim - 2))
