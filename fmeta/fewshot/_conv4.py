"""The network of four convolutions that few-shot classification is measured with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta._convolutions import conv2d, max_pool2d
from fmeta.fewshot._model import Model
from fmeta.tasks._networks import affine

__all__ = ["conv4"]


def conv4(
    ways: int | None = 5,
    *,
    side: int = 28,
    in_channels: int = 1,
    channels: int = 32,
    blocks: int = 4,
    batch_norm: bool = True,
) -> Model:
    """Blocks of convolution 3x3, normalisation, relu and pooling 2x2, then a linear layer.

    Args:
        ways: outputs; None: no last layer, the outputs are the features.
        side: of the square images, which are ``(n, in_channels, side, side)``, or with one channel
            also ``(n, side, side)``; or flat, ``(n, in_channels * side * side)``.
        in_channels: of the images.
        channels: of every block.
        blocks: how many; each halves the side, rounded down.
        batch_norm: normalise each channel over batch and places, with learned scale and shift.

    Returns:
        A `Model` with parameters ``"conv0.w"``, ``"conv0.b"``, ``"norm0.w"``, ..., ``"head.b"``
        and, as statistics, mean and variance of each normalisation.

    Raises:
        ValueError: images too small for that many blocks, or a number below 1; later, images of
            another shape.

    Reference:
        Vinyals et al., "Matching networks" (1606.04080); Finn et al. (1703.03400), section 5.2.
    """
    sizes = {"side": side, "in_channels": in_channels, "channels": channels, "blocks": blocks}
    for name, value in {**sizes, **({} if ways is None else {"ways": ways})}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    last = side >> blocks
    if not last:
        raise ValueError(f"{blocks} poolings leave nothing of a side of {side}: fewer blocks")
    features = channels * last * last

    def check_images(x: Tensor) -> None:
        grey = in_channels == 1 and x.shape[1:] == (side, side)
        flat = x.ndim == 2 and x.shape[1] == in_channels * side * side
        if grey or flat or x.shape[1:] == (in_channels, side, side):
            return
        got = tuple(x.shape[1:])
        if x.ndim == 4 and got[1:] == (side, side):
            cure = f"in_channels={got[0]}"
        elif in_channels > 1 and got == (side, side):
            cure = "in_channels=1"
        else:
            cure = "side= and in_channels= of these images"
        raise ValueError(
            f"conv4 was made for images of shape ({in_channels}, {side}, {side}), got (n, "
            f"{', '.join(map(str, got))}): make it with {cure}"
        )

    def init(generator: torch.Generator) -> dict[str, Tensor]:
        params: dict[str, Tensor] = {}
        before = in_channels
        for i in range(blocks):
            shape = (channels, before, 3, 3)
            scale = math.sqrt(2 / (9 * before))
            params[f"conv{i}.w"] = scale * torch.randn(shape, generator=generator)
            params[f"conv{i}.b"] = torch.zeros(channels)
            if batch_norm:
                params[f"norm{i}.w"] = torch.ones(channels)
                params[f"norm{i}.b"] = torch.zeros(channels)
            before = channels
        if ways is not None:
            scale = 1 / math.sqrt(features)
            params["head.w"] = scale * torch.randn(features, ways, generator=generator)
            params["head.b"] = torch.zeros(ways)
        return params

    def embed(params: Any, x: Tensor, stats: Any = ()) -> tuple[Tensor, Any]:
        check_images(x)
        x = x.reshape(-1, in_channels, side, side)
        seen = []
        for i in range(blocks):
            x = conv2d(x, params[f"conv{i}.w"], params[f"conv{i}.b"], padding=1)
            if batch_norm:
                mean = stats[i][0] if stats else x.mean((0, 2, 3))
                x = x - mean[:, None, None]
                # `torch.var_mean` takes three times as long here.
                var = stats[i][1] if stats else x.square().mean((0, 2, 3))
                seen.append((mean, var))
                scale = params[f"norm{i}.w"] * (var + 1e-5).rsqrt()
                x = x * scale[:, None, None] + params[f"norm{i}.b"][:, None, None]
            x = F.relu(max_pool2d(x, 2))  # in the other order the same, on four times as much
        return x.flatten(1), tuple(seen)

    def head(params: Any, features: Tensor) -> Tensor:
        return features if ways is None else affine(params, "head", features)

    def apply(params: Any, x: Tensor, stats: Any = ()) -> tuple[Tensor, Any]:
        features, seen = embed(params, x, stats)
        return head(params, features), seen

    return Model(init, apply, lambda name: name.startswith("head."), embed, head, features)
