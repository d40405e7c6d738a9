"""Classification of scikit-learn's 8x8 digits: real data that ships inside a package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.random import fold_in
from fmeta.tasks._family import TaskFamily

__all__ = ["digits"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
_SIZES = {"train": 1200, "validation": 297, "test": 300}


def digits(
    widths: tuple[int, ...] = (32,), activation: str = "relu", batch_size: int = 128
) -> TaskFamily:
    """Fully connected classifiers of the 1,797 digits (64 grey values each, 10 classes).

    The images are split once and for all into 1,200 to train on, 297 to validate and 300 to test.
    Tasks differ by initialisation and batches; a batch is a tensor of image indices.

    Args:
        widths: hidden layer widths of the classifier, 64-...-10.
        activation: ``"relu"``, ``"tanh"`` or ``"gelu"``.
        batch_size: images in a batch, drawn with replacement from the split.

    Returns:
        A `TaskFamily` with ``model_params = {"w0": (64, width), "b0": (width,), ...}``.

    Raises:
        ValueError: for an unknown activation, or a width or batch size below 1.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: there are {', '.join(_ACTIVATIONS)}")
    for name, value in (
        *((f"widths[{i}]", w) for i, w in enumerate(widths)),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    act = _ACTIVATIONS[activation]
    sizes = (64, *widths, 10)
    layers = len(sizes) - 1
    data, rows = _load()

    def sample(generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def init(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
        params = {}
        for i in range(layers):
            bound = 1 / math.sqrt(sizes[i])
            w = torch.rand(sizes[i], sizes[i + 1], generator=generator)
            params[f"w{i}"] = (2 * w - 1) * math.sqrt(3) * bound
            params[f"b{i}"] = torch.zeros(sizes[i + 1])
        return params

    def batches(
        config: Any, generator: torch.Generator, steps: int, split: str = "train"
    ) -> Tensor:
        if split not in rows:
            raise ValueError(f"unknown split {split!r}: there are {', '.join(rows)}")
        pick = torch.randint(len(rows[split]), (steps, batch_size), generator=generator)
        return rows[split][pick]

    def loss(data: Any, config: Any, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        x = data["x"][batch]
        for i in range(layers):
            x = x @ params[f"w{i}"] + params[f"b{i}"]
            if i < layers - 1:
                x = act(x)
        return F.cross_entropy(x, data["y"][batch])

    return TaskFamily(data, sample, init, batches, loss)


def _load() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32) / 16
    data = {"x": (x - x.mean()) / x.std(), "y": torch.tensor(bunch.target)}
    order = torch.randperm(len(x), generator=fold_in(1797))
    parts = order.split(list(_SIZES.values()))
    return data, dict(zip(_SIZES, parts, strict=True))
