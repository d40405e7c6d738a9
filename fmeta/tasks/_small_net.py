"""A tiny network that classifies random clusters: few parameters, many bad valleys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.tasks._clusters import balanced_labels, check_numbers, gaussian_points, shuffled
from fmeta.tasks._family import TaskFamily
from fmeta.tasks._mlp import mlp
from fmeta.tasks._networks import cross_entropy

__all__ = ["small_net"]


def small_net(
    dim: int = 2,
    hidden: int = 2,
    classes: int = 2,
    points: int = 100,
    clusters: int = 4,
    batch_size: int | None = None,
    weight_decay: float = 5e-4,
) -> TaskFamily:
    """Cross-entropy of a network dim-hidden-classes (ReLU) on clusters, + weight_decay / 2 |W|^2.

    Each task has Gaussians with means, covariances and labels of its own; each label has one of
    them at least. Weights begin uniform with variance 1 / inputs, biases at zero.

    Args:
        dim, hidden, classes: of the network.
        points: of a task, in each split, evenly over clusters.
        clusters: Gaussians, at least as many as classes.
        batch_size: points a batch; None: all, so that the loss is the same function at every step.
        weight_decay: of the two matrices, not of the biases.

    Returns:
        A `TaskFamily` with ``config = {"x": (3 points, dim), "y": (3 points,)}`` (one split after
        the other), ``model_params = {"w0": (dim, hidden), "b0": (hidden,), "w1": (hidden, classes),
        "b1": (classes,)}`` and batches of places in them: (steps, batch_size). Its metric is the
        accuracy, its extras are activations.

    Raises:
        ValueError: for numbers below 1, more points in a batch than there are, fewer clusters than
            classes, a negative decay.

    Reference:
        Li and Malik, "Learning to optimize" (1606.01885), the third of its problems.
    """
    counts = {"dim": dim, "hidden": hidden, "classes": classes, "clusters": clusters}
    check_numbers(batch_size, weight_decay, points=points, **counts)
    if clusters < classes:
        raise ValueError(
            f"clusters must be at least as many as classes, got {clusters} and {classes}"
        )
    network = mlp((dim, hidden, classes), "relu")

    def sample(generator: torch.Generator) -> dict[str, Tensor]:
        x, cluster = gaussian_points(generator, clusters, points, dim)
        return {"x": x, "y": balanced_labels(generator, clusters, classes)[cluster]}

    def init(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return network.init(generator)

    def batches(
        config: Any, generator: torch.Generator, steps: int, split: str = "train"
    ) -> Tensor:
        return shuffled(generator, points, steps, batch_size, split)

    def loss(data: Any, config: Any, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        logits = network.apply(params, config["x"][batch])
        squares = params["w0"].square().sum() + params["w1"].square().sum()
        return cross_entropy(logits, config["y"][batch]) + weight_decay / 2 * squares

    def metrics(
        data: Any, config: Any, params: dict[str, Tensor], batch: Tensor
    ) -> dict[str, Tensor]:
        logits = network.apply(params, config["x"][batch])
        return {"accuracy": (logits.argmax(-1) == config["y"][batch]).to(logits.dtype).mean()}

    def extras(data: Any, config: Any, params: dict[str, Tensor], batch: Tensor) -> dict[str, Any]:
        assert network.activity is not None

        def error(logits: Tensor) -> Tensor:
            return F.one_hot(config["y"][batch], classes) - logits.softmax(-1)

        return {"activations": network.activity(params, config["x"][batch], error)}

    return TaskFamily((), sample, init, batches, loss, metrics, extras)
