"""Convolutions and pooling on a CPU whose derivatives of any order are as fast as their values.

torch takes the second derivative of a convolution by convolutions with kernels as large as the
images, and that of what needs none, too. Its pooling is slow unless channels are last in memory,
and so is a convolution of one channel. Here a convolution and its two gradients are three bilinear
functions, each of which has the other two as derivatives, and everything stays with channels last:
the meta-gradient of a network of four blocks takes three quarters of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fmeta._autodiff import inside_transform

__all__ = ["conv2d", "fast_convolutions", "max_pool2d"]

_aten = torch.ops.aten
_BATCHED = torch._C._dispatch_key_parse("Batched")
Pair = int | Sequence[int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: str | Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`, by rounding the same."""
    plain = all(isinstance(x, (int, list, tuple)) for x in (stride, padding, dilation))
    if not plain or groups != 1 or input.dtype is not weight.dtype or not _is_ours(input):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    assert not isinstance(padding, str)
    geometry = _Geometry(_pair(stride), _pair(padding), _pair(dilation))
    return _Convolution.apply(input, weight, bias, geometry)


def max_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`torch.nn.functional.max_pool2d`, the same."""
    given = (kernel_size, stride or 0, padding, dilation)
    plain = all(isinstance(x, (int, list, tuple)) for x in given) and isinstance(ceil_mode, bool)
    if return_indices or not plain or not _is_ours(input):
        torchs: Any = F.max_pool2d
        return torchs(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    kernel = _pair(kernel_size)
    steps = kernel if stride is None or stride == [] else _pair(stride)
    return _Pooling.apply(input, _Window(kernel, steps, _pair(padding), _pair(dilation), ceil_mode))


def fast_convolutions() -> AbstractContextManager[Any]:
    """A context in which torch's functions, those of its layers too, are the ones above.

    It does nothing under a transform of `torch.func`, which has rules for torch's own.
    """
    return nullcontext() if inside_transform() else _Ours()


class _Ours(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours: Callable[..., Any] = _OURS.get(func, func)
        return ours(*args, **(kwargs or {}))


_OURS: dict[Any, Callable[..., Any]] = {F.conv2d: conv2d, F.max_pool2d: max_pool2d}


def _is_ours(x: Tensor) -> bool:
    if x.ndim != 4 or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if inside_transform() or torch.is_autocast_enabled("cpu"):
        return False
    return torch.backends.mkldnn.is_available() and x.numel() > 0


class _Geometry(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    def gradients(self, u: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Any:
        """Of ``sum(u * conv2d(x, weight))``: with respect to x, to the weight."""
        return _aten.convolution_backward(u, x, weight, None, *self, False, [0, 0], 1, mask)


def _is_wrapped(*tensors: Tensor) -> bool:
    """Whether a graph that was recorded outside of all transforms is walked within one.

    The `vmap` of ``is_grads_batched`` is an older one, which no transform of `torch.func` tells of.
    """
    keys = (torch._C._dispatch_keys(x) for x in tensors)
    return inside_transform() or any(k.has(_BATCHED) for k in keys)


def _gradient_of_input(u: Tensor, weight: Tensor, shape: Sequence[int], by: _Geometry) -> Tensor:
    if _is_wrapped(u, weight):
        return by.gradients(u, u.new_zeros(shape), weight, [True, False, False])[0]
    return _GradientOfInput.apply(u, weight, shape, by)


def _gradient_of_weight(u: Tensor, x: Tensor, shape: Sequence[int], by: _Geometry) -> Tensor:
    if _is_wrapped(u, x):
        return by.gradients(u, x, u.new_zeros(shape), [False, True, False])[1]
    return _GradientOfWeight.apply(u, x, shape, by)


def _convolved(x: Tensor, weight: Tensor, by: _Geometry) -> Tensor:
    if _is_wrapped(x, weight):
        return torch.conv2d(x, weight, None, *by)
    return _Convolution.apply(x, weight, None, by)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, by: _Geometry) -> Tensor:
        ctx.by = by
        ctx.save_for_backward(x, weight)
        return torch.conv2d(_channels_last(x), weight, bias, *by)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        return (
            _gradient_of_input(u, weight, x.shape, ctx.by) if for_x else None,
            _gradient_of_weight(u, x, weight.shape, ctx.by) if for_weight else None,
            u.sum((0, 2, 3)) if for_bias else None,
            None,
        )


class _GradientOfInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, shape: Sequence[int], by: _Geometry) -> Tensor:
        ctx.by = by
        ctx.save_for_backward(u, weight)
        unread = _empty_channels_last(u, shape)
        return by.gradients(_channels_last(u), unread, weight, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        u, weight = ctx.saved_tensors
        for_u, for_weight, *_ = ctx.needs_input_grad
        return (
            _convolved(v, weight, ctx.by) if for_u else None,
            _gradient_of_weight(u, v, weight.shape, ctx.by) if for_weight else None,
            None,
            None,
        )


class _GradientOfWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, shape: Sequence[int], by: _Geometry) -> Tensor:
        ctx.by = by
        ctx.save_for_backward(u, x)
        unread = u.new_empty(shape)
        return by.gradients(_channels_last(u), _channels_last(x), unread, [False, True, False])[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        u, x = ctx.saved_tensors
        for_u, for_x, *_ = ctx.needs_input_grad
        return (
            _convolved(x, v, ctx.by) if for_u else None,
            _gradient_of_input(u, v, x.shape, ctx.by) if for_x else None,
            None,
            None,
        )


class _Window(NamedTuple):
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil_mode: bool


def _spread(u: Tensor, places: Tensor, shape: Sequence[int], by: _Window) -> Tensor:
    if _is_wrapped(u):
        x = u.new_zeros(shape)
        return _aten.max_pool2d_with_indices_backward(u, x, *by, places)
    return _Spread.apply(u, places, shape, by)


def _taken(v: Tensor, places: Tensor, shape: Sequence[int], by: _Window) -> Tensor:
    if _is_wrapped(v):
        n, c, h, w = shape
        at = places.reshape(n, c, -1)
        return v.reshape(n, c, h * w).gather(2, at).reshape(places.shape)
    return _Taken.apply(v, places, shape, by)


class _Pooling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: _Window) -> Tensor:
        out, places = _aten.max_pool2d_with_indices(_channels_last(x), *by)
        ctx.by, ctx.shape = by, x.shape
        ctx.save_for_backward(places)
        return out

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return _spread(u, places, ctx.shape, ctx.by), None


class _Spread(torch.autograd.Function):
    """Numbers of the outputs of a pooling, each at the place that it was taken from."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, places: Tensor, shape: Sequence[int], by: _Window) -> Tensor:
        ctx.by, ctx.shape = by, shape
        ctx.save_for_backward(places)
        unread = _empty_channels_last(u, shape)
        return _aten.max_pool2d_with_indices_backward(_channels_last(u), unread, *by, places)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return _taken(v, places, ctx.shape, ctx.by), None, None, None


class _Taken(torch.autograd.Function):
    """Of inputs of a pooling those at the places that its outputs were taken from."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, places: Tensor, shape: Sequence[int], by: _Window) -> Tensor:
        ctx.by, ctx.shape = by, shape
        ctx.save_for_backward(places)
        n, c, h, w = places.shape
        rows, at = (_channels_last(t).permute(0, 2, 3, 1).reshape(n, -1, c) for t in (v, places))
        return rows.gather(1, at).view(n, h, w, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return _spread(u, places, ctx.shape, ctx.by), None, None, None


def _channels_last(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    if c == 1 and x.is_contiguous():  # one channel is in both orders: its strides tell which
        return x.view(n, h, w, 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def _empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    _, c, h, w = shape
    return like.new_empty_strided(shape, (c * h * w, 1, w * c, c))


def _pair(x: Pair) -> list[int]:
    if isinstance(x, int):
        return [x, x]
    return list(x) if len(x) > 1 else [*x, *x]
