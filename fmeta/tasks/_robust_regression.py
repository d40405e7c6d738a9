"""Linear regression with a bounded loss on clusters that disagree: smooth, and not convex."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta.tasks._clusters import check_numbers, gaussian_points, shuffled
from fmeta.tasks._family import TaskFamily

__all__ = ["robust_regression"]


def robust_regression(
    dim: int = 3,
    points: int = 100,
    clusters: int = 4,
    batch_size: int | None = None,
    scale: float = 1.0,
    noise: float = 0.1,
) -> TaskFamily:
    """``mean r^2 / (scale^2 + r^2)`` with ``r = y - w' x - b``, the loss of Geman and McClure.

    Each task has Gaussians of its own (mean standard normal, covariance the identity), and each of
    these has a linear function of its own: ``y = v' x + c + noise * z``, with v, c and z standard
    normal. So what is near one of these functions lies in a valley, beside others, and far off the
    gradient vanishes. Initial w and b are standard normal.

    Args:
        dim: of a point.
        points: of a task, in each split, evenly over clusters.
        clusters: Gaussians.
        batch_size: points a batch; None: all, so that the loss is the same function at every step.
        scale: residuals well above it count 1.
        noise: deviation of y from the linear function of its cluster.

    Returns:
        A `TaskFamily` with ``config = {"x": (3 points, dim), "y": (3 points,)}`` (one split after
        the other), ``model_params = {"w": (dim,), "b": ()}`` and batches of places in them:
        (steps, batch_size).

    Raises:
        ValueError: for numbers below 1, more points in a batch than there are, a scale that is not
            positive, a negative noise.

    Reference:
        Li and Malik, "Learning to optimize" (1606.01885), the second of its problems.
    """
    check_numbers(batch_size, dim=dim, points=points, clusters=clusters)
    for name, value, is_right in (("scale", scale, scale > 0), ("noise", noise, noise >= 0)):
        if not is_right or not math.isfinite(value):
            least = "positive" if name == "scale" else "0 or above"
            raise ValueError(f"{name} must be {least} and finite, got {value}")

    def sample(generator: torch.Generator) -> dict[str, Tensor]:
        x, cluster = gaussian_points(generator, clusters, points, dim, identity=True)
        slope = torch.randn(clusters, dim, generator=generator)
        bias = torch.randn(clusters, generator=generator)
        off = noise * torch.randn(len(x), generator=generator)
        return {"x": x, "y": (x * slope[cluster]).sum(1) + bias[cluster] + off}

    def init(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
        values = torch.randn(dim + 1, generator=generator)
        return {"w": values[:dim], "b": values[dim]}

    def batches(
        config: Any, generator: torch.Generator, steps: int, split: str = "train"
    ) -> Tensor:
        return shuffled(generator, points, steps, batch_size, split)

    def loss(data: Any, config: Any, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        residual = config["y"][batch] - config["x"][batch] @ params["w"] - params["b"]
        square = residual.square()
        return (square / (scale**2 + square)).mean()

    return TaskFamily((), sample, init, batches, loss)
