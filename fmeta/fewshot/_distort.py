"""Images distorted at random: affine and elastic maps, thinner and thicker strokes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.random import fold_in

__all__ = ["distorted"]


def distorted(
    images: np.ndarray[Any, Any], copies: int, side: int, seed: int, strength: float = 1.0
) -> Tensor:
    """Each image ``copies`` times, each time distorted in another way.

    Args:
        images: bytes ``(classes, styles, large, large)``.
        copies: of each.
        side: of the results.
        seed: distortions of class i are a function of seed and i.
        strength: of rotation, shear, size, place, waves and stroke width together.

    Returns:
        Bytes ``(classes, styles * copies, side, side)``.
    """
    found = []
    for i, of_class in enumerate(images):
        x = torch.from_numpy(of_class).float().repeat_interleave(copies, 0)[:, None] / 255
        found.append(_distorted(x, side, fold_in(seed, i, 17), strength))
    return torch.stack(found)


def _distorted(x: Tensor, side: int, g: torch.Generator, strength: float) -> Tensor:
    n, large = len(x), x.shape[-1]

    def uniform(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(n, *shape, generator=g) - 1)

    angle, shear = uniform() * math.radians(15), 0.2 * uniform()
    width, height = torch.exp(0.15 * uniform()), torch.exp(0.15 * uniform())
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)],
        -2,
    )
    zeros = torch.zeros(n)
    slant = torch.stack([torch.stack([width, shear], -1), torch.stack([zeros, height], -1)], -2)
    place = 0.07 * uniform(2, 1)
    grid = F.affine_grid(torch.cat([turn @ slant, place], -1), [n, 1, large, large], False)
    waves = torch.randn(n, 2, 4, 4, generator=g) * 0.06 * strength
    waves = F.interpolate(waves, size=(large, large), mode="bicubic", align_corners=True)
    x = F.grid_sample(x, grid + waves.permute(0, 2, 3, 1), align_corners=False)
    x = _strokes(x, uniform())
    x = F.adaptive_avg_pool2d(x, side)
    return (255 * x[:, 0]).round().to(torch.uint8)


def _strokes(x: Tensor, change: Tensor) -> Tensor:
    """Thicker where ``change`` is above 0, thinner below: a level of the blurred image."""
    kernel = torch.exp(-(torch.arange(-4, 5.0) ** 2) / (2 * 1.6**2))
    kernel = (kernel / kernel.sum())[None, None]
    blurred = F.conv2d(F.conv2d(x, kernel[..., None, :], padding=(0, 4)), kernel[..., None],
                       padding=(4, 0))  # fmt: skip
    level = (0.42 - 0.17 * change)[:, None, None, None]
    return torch.sigmoid((blurred - level) * 14)
