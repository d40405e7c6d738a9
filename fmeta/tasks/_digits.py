"""Tasks on scikit-learn's 8x8 digits: real data that ships inside a package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.tasks._cnn import cnn
from fmeta.tasks._digits_data import VERSIONS, images, online_images, online_pick, pick
from fmeta.tasks._family import TaskFamily
from fmeta.tasks._mlp import mlp
from fmeta.tasks._networks import Network, check_widths, cross_entropy
from fmeta.tasks._transformer import transformer

__all__ = ["digits"]

_MODELS = ("mlp", "cnn", "autoencoder", "transformer")


def digits(
    widths: tuple[int, ...] = (32,),
    activation: str = "relu",
    batch_size: int = 128,
    model: str = "mlp",
    online: bool = False,
) -> TaskFamily:
    """Networks on the 1,797 digits (64 grey values each, 10 classes).

    The images are split once and for all into 1,200 to train on, 297 to validate and 300 to test.
    Tasks differ by initialisation and batches; a batch is a tensor of image indices.

    With ``online`` every image is rotated (by up to 20 degrees), shifted (by up to a pixel) and
    given Gaussian noise (standard deviation 0.3; all pixels together have 1) each time that it is
    drawn, in every split, so that training loss estimates generalisation. 64 versions of each
    image are made once a process (29 MB); a batch holds, for each of its images, the row of a
    version and the place in a bank of noise where its own begins: (batch_size, 2). An autoencoder
    is to find the version without the noise.

    Args:
        widths: of the hidden layers. ``"mlp"``: 64-...-10; ``"cnn"``: channels of 3x3 convolutions
            of stride 2, then a linear layer; ``"autoencoder"``: 64-...-64 with the widths and
            then their mirror image (the last one stands once); ``"transformer"``: a block each,
            all of one even width, on the 8 rows of the image as tokens.
        activation: ``"relu"``, ``"tanh"`` or ``"gelu"``.
        batch_size: images in a batch, drawn with replacement from the split.
        model: what is trained: by cross-entropy, but an autoencoder by mean squared error.
        online: whether every batch is freshly transformed.

    Returns:
        A `TaskFamily` with a flat dict of parameters, ``{"w0": (64, width), "b0": (width,), ...}``
        for the first, and the metric ``accuracy`` for classifiers. ``"mlp"`` and ``"autoencoder"``
        have ``extras``: ``"activations"``, whose last layer is told its error, target (one-hot)
        minus output (softmax of it).

    Raises:
        ValueError: for an unknown activation or model, a width or batch size below 1, or widths
            that the model cannot have.
    """
    network = _network(model, widths, activation)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    classifies = model != "autoencoder"
    draw = online_pick if online else pick

    def sample(generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def init(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return network.init(generator)

    def batches(
        config: Any, generator: torch.Generator, steps: int, split: str = "train"
    ) -> Tensor:
        return draw(generator, split, steps, batch_size)

    def shown(
        data: dict[str, Tensor], params: dict[str, Tensor], batch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the network sees of the batch, and what it should give."""
        row = batch[..., 0] if online else batch
        clean = noisy = F.embedding(row, data["x"])
        if online:
            noise = data["noise"].unfold(0, 64, 1)  # a view: what begins at each place
            noisy = clean + F.embedding(batch[..., 1], noise)
        dtype = next(iter(params.values())).dtype
        if not classifies:
            return noisy.to(dtype), clean.to(dtype)
        return noisy.to(dtype), data["y"][row // VERSIONS if online else row]

    def loss(data: Any, config: Any, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        x, want = shown(data, params, batch)
        out = network.apply(params, x)
        return cross_entropy(out, want) if classifies else (out - want).square().mean()

    def metrics(
        data: Any, config: Any, params: dict[str, Tensor], batch: Tensor
    ) -> dict[str, Tensor]:
        x, want = shown(data, params, batch)
        out = network.apply(params, x)
        return {"accuracy": (out.argmax(-1) == want).to(out.dtype).mean()}

    def extras(
        data: Any, config: Any, params: dict[str, Tensor], batch: Tensor
    ) -> dict[str, list[Any]]:
        assert network.activity is not None
        x, want = shown(data, params, batch)

        def error(out: Tensor) -> Tensor:
            if not classifies:
                return want - out
            classes = torch.arange(out.shape[-1], device=out.device)
            return (want[:, None] == classes).to(out.dtype) - out.softmax(-1)

        return {"activations": network.activity(params, x, error)}

    return TaskFamily(
        online_images() if online else images(),
        sample,
        init,
        batches,
        loss,
        metrics if classifies else None,
        None if network.activity is None else extras,
    )


def _network(model: str, widths: tuple[int, ...], activation: str) -> Network:
    if model not in _MODELS:
        raise ValueError(f"unknown model {model!r}: there are {', '.join(_MODELS)}")
    check_widths(widths)
    if not widths and model != "mlp":
        raise ValueError(f"widths is empty: a {model!r} needs at least one")
    if model == "mlp":
        return mlp((64, *widths, 10), activation)
    if model == "autoencoder":
        return mlp((64, *widths, *widths[-2::-1], 64), activation)
    if model == "cnn":
        return cnn(8, widths, 10, activation)
    if widths[0] % 2 or len(set(widths)) > 1:
        raise ValueError(
            f"the blocks of a 'transformer' have one even width, as (32, 32), got {widths}"
        )
    return transformer(8, 8, widths[0], len(widths), 10, activation)
