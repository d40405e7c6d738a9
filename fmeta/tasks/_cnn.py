"""Convolutional networks of square images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta._trace import is_compiled
from fmeta.tasks._networks import Network, activation_named, uniform

__all__ = ["cnn"]


def cnn(side: int, channels: Sequence[int], outputs: int, activation: str) -> Network:
    """3x3 convolutions of stride 2 (padding 1), then a linear layer on all that is left.

    Parameters ``conv0.w: (channels[0], 1, 3, 3)``, ``conv0.b``, ...,
    ``head.w: (remaining side**2 * channels[-1], outputs)``, ``head.b``.
    """
    act = activation_named(activation)
    widths = (1, *channels)
    last = side
    for _ in channels:
        last = (last + 1) // 2
    features = last * last * widths[-1]

    def init(generator: torch.Generator) -> dict[str, Tensor]:
        params = {}
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            shape = (after, before, 3, 3)
            params[f"conv{i}.w"] = uniform(generator, *shape, fan_in=9 * before)
            params[f"conv{i}.b"] = torch.zeros(after)
        params["head.w"] = uniform(generator, features, outputs, fan_in=features)
        params["head.b"] = torch.zeros(outputs)
        return params

    def apply(params: dict[str, Tensor], x: Tensor) -> Tensor:
        x = x.flatten(1).T.reshape(1, side, side, -1)
        for i in range(len(channels)):
            x = act(_conv(x, params[f"conv{i}.w"]) + params[f"conv{i}.b"][:, None, None, None])
        # The head has the channels of a place side by side.
        x = x.permute(1, 2, 0, 3).flatten(0, 2)
        return (params["head.w"].T @ x + params["head.b"][:, None]).T

    return Network(init, apply)


def _conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolution of ``x``: (channels, side, side, batch) by one matrix product.

    Kernels that differ by task make a batched convolution a grouped one, which on a CPU is no
    faster than one after another; a matrix product of patches is. With the batch last all that is
    copied lies side by side, however few channels there are.
    """
    half = (x.shape[1] + 1) // 2
    patches = _corners(x) if is_compiled() else _windows(_windows(x, 1, 1), 3, 2)
    patches = patches.reshape(9 * len(x), -1)
    return (kernel.flatten(1) @ patches).reshape(-1, half, half, x.shape[-1])


def _corners(x: Tensor) -> Tensor:
    """Patches by slices of the padded tensor (`Tensor.unfold` has no batched backward).

    Compiled, it and its derivative are one loop over what is read and one over what is written: a
    step of 64 networks is a tenth faster than with windows of windows.
    """
    side = x.shape[1]
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    corners = [(i, j) for i in range(3) for j in range(3)]
    return torch.stack([x[:, i : i + side : 2, j : j + side : 2] for i, j in corners], 1)


def _windows(x: Tensor, axis: int, at: int) -> Tensor:
    """Windows of 3 at every second place of an axis (padding 1), as a new axis ``at``.

    Of each pair of neighbours the first is in the middle of a window, the second at its end, and
    at the beginning of the next one. So the derivative is a sum of two terms; that of slices of
    the padded tensor fills a tensor with zeros for each, which takes half of a step that is not
    compiled.
    """
    n, behind = x.shape[axis], [0, 0] * (x.ndim - axis - 1)
    if n % 2:
        x = F.pad(x, [*behind, 0, 1])
    middle, end = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return torch.stack([F.pad(end, [*behind, 1, -1]), middle, end], at)
