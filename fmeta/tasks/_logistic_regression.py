"""Logistic regression on two random Gaussians: a convex problem of few parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.tasks._clusters import check_numbers, gaussian_points, shuffled
from fmeta.tasks._family import TaskFamily

__all__ = ["logistic_regression"]


def logistic_regression(
    dim: int = 3, points: int = 100, batch_size: int | None = None, weight_decay: float = 5e-4
) -> TaskFamily:
    """``mean log(1 + exp(-s (w' x + b))) + weight_decay / 2 |w|^2``, s = +-1 for the two Gaussians.

    Each task has two Gaussians with means and covariances of its own, half of the points from each.
    Initial w and b are standard normal.

    Args:
        dim: of a point.
        points: of a task, in each split (of the same Gaussians).
        batch_size: points a batch; None: all, so that the loss is the same function at every step.
        weight_decay: of w, not of b.

    Returns:
        A `TaskFamily` with ``config = {"x": (3 points, dim), "y": (3 points,)}`` (one split after
        the other; y is 0 or 1), ``model_params = {"w": (dim,), "b": ()}`` and batches of places in
        them: (steps, batch_size). Its metric is the accuracy.

    Raises:
        ValueError: for numbers below 1, more points in a batch than there are, a negative decay.

    Reference:
        Li and Malik, "Learning to optimize" (1606.01885), the first of its problems.
    """
    check_numbers(batch_size, weight_decay, dim=dim, points=points)

    def sample(generator: torch.Generator) -> dict[str, Tensor]:
        x, cluster = gaussian_points(generator, 2, points, dim)
        return {"x": x, "y": cluster.to(x.dtype)}

    def init(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
        values = torch.randn(dim + 1, generator=generator)
        return {"w": values[:dim], "b": values[dim]}

    def batches(
        config: Any, generator: torch.Generator, steps: int, split: str = "train"
    ) -> Tensor:
        return shuffled(generator, points, steps, batch_size, split)

    def logits(config: Any, params: dict[str, Tensor], batch: Tensor) -> tuple[Tensor, Tensor]:
        return config["x"][batch] @ params["w"] + params["b"], config["y"][batch]

    def loss(data: Any, config: Any, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        z, y = logits(config, params, batch)
        # log(1 + exp(z)) - y z, which is that of -z where y is 1.
        return (F.softplus(z) - y * z).mean() + weight_decay / 2 * params["w"].square().sum()

    def metrics(
        data: Any, config: Any, params: dict[str, Tensor], batch: Tensor
    ) -> dict[str, Tensor]:
        z, y = logits(config, params, batch)
        return {"accuracy": ((z > 0) == (y > 0.5)).to(z.dtype).mean()}

    return TaskFamily((), sample, init, batches, loss, metrics)
