"""scikit-learn's 8x8 digits as tensors, as they are and freshly transformed; drawn batches."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.random import fold_in
from fmeta.tasks._family import SPLITS, check_split

__all__ = ["VERSIONS", "images", "moved", "online_images", "online_pick", "pick", "split_rows"]

VERSIONS = 64  # transformed versions of each image
_ROTATION, _SHIFT, _NOISE = math.radians(20), 1.0, 0.3  # limits in radians and pixels; std
_OFFSETS = 2**16  # places in the bank of noise where an image's noise may begin
_SIZES = (1200, 297, 300)  # images in each of SPLITS


@functools.cache
def images() -> dict[str, Tensor]:
    """``x``: (1797, 64), of mean 0 and variance 1 over all pixels; ``y``: (1797,)."""
    grey, labels = _load()
    return {"x": _normalized(grey), "y": labels}


@functools.cache
def online_images() -> dict[str, Tensor]:
    """``x``: (1797 * VERSIONS, 64), versions of an image side by side; ``y``: (1797,); ``noise``.

    Every version has a rotation and a shift of its own, interpolated bilinearly. ``noise``:
    (OFFSETS + 63,), of which any 64 neighbours are the noise of an image.
    """
    grey, labels = _load()
    limits = torch.tensor([_ROTATION, _SHIFT, _SHIFT])[:, None]
    random = torch.rand(3, len(grey) * VERSIONS, generator=fold_in(1797, 1))
    x = moved(grey.repeat_interleave(VERSIONS, 0), *(2 * random - 1) * limits)
    noise = _NOISE * torch.randn(_OFFSETS + 63, generator=fold_in(1797, 2))
    return {"x": _normalized(x), "y": labels, "noise": noise}


def moved(x: Tensor, angle: Tensor, left: Tensor, up: Tensor) -> Tensor:
    """Images shifted, in pixels, and then rotated counter-clockwise, in radians; black comes in.

    Args:
        x: (n, 64), black is 0.
        angle, left, up: (n,).
    """
    cos, sin = angle.cos(), angle.sin()
    # For each place where its grey comes from, in units of half the image.
    rows = ([cos, -sin, left / 4], [sin, cos, up / 4])
    source = torch.stack([torch.stack(row, -1) for row in rows], 1)
    grid = F.affine_grid(source, [len(x), 1, 8, 8], align_corners=False)
    return F.grid_sample(x.reshape(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


def split_rows(split: str) -> Tensor:
    """Which images are in a split."""
    check_split(split)
    return _splits()[split]


def pick(generator: torch.Generator, split: str, *shape: int) -> Tensor:
    """Images of a split, with replacement: int64 of this shape."""
    rows = split_rows(split)
    return rows[torch.randint(len(rows), shape, generator=generator)]


def online_pick(generator: torch.Generator, split: str, *shape: int) -> Tensor:
    """As `pick`, of shape (*shape, 2): the row of a version in ``x``, where its noise begins."""
    row = pick(generator, split, *shape) * VERSIONS
    row = row + torch.randint(VERSIONS, shape, generator=generator)
    return torch.stack([row, torch.randint(_OFFSETS, shape, generator=generator)], -1)


@functools.cache
def _splits() -> dict[str, Tensor]:
    order = torch.randperm(sum(_SIZES), generator=fold_in(1797))
    return dict(zip(SPLITS, order.split(list(_SIZES)), strict=True))


@functools.cache
def _load() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch = load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)


def _normalized(grey: Tensor) -> Tensor:
    plain = _load()[0]
    return (grey - plain.mean()) / plain.std()
