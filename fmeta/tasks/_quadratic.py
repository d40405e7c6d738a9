"""Quadratics: tasks whose optimum, losses and meta-gradients are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta.tasks._family import TaskFamily, check_split

__all__ = ["quadratic", "quadratic_losses", "quadratic_meta_gradient", "quadratic_optimum"]


def quadratic(dim: int = 10, condition: float = 100.0, noise: float = 0.0) -> TaskFamily:
    """``1/2 (x - c)' H (x - c)`` with a positive definite H and an optimum c of each task's own.

    H has random eigenvectors and eigenvalues log-uniform in [1 / condition, 1]; c and the initial
    x are standard normal. A batch moves the optimum it shows to ``c + noise * z`` with z standard
    normal, so its gradient is off by ``-noise * H z``, zero in the mean.

    Args:
        dim: number of coordinates.
        condition: largest ratio of two eigenvalues of H.
        noise: standard deviation, per coordinate, of the optimum that a batch shows.

    Returns:
        A `TaskFamily` with ``config = {"H": (dim, dim), "c": (dim,)}``,
        ``model_params = {"x": (dim,)}`` and batches z: (steps, dim).

    Raises:
        ValueError: for a dimension or condition below 1, or a negative noise.
    """
    for name, value, least in (("dim", dim, 1), ("condition", condition, 1), ("noise", noise, 0)):
        if not (value >= least and math.isfinite(value)):
            raise ValueError(f"{name} must be at least {least} and finite, got {value}")

    def sample(generator: torch.Generator) -> dict[str, Tensor]:
        basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
        eigenvalues = condition ** -torch.rand(dim, generator=generator)
        h = (basis * eigenvalues) @ basis.T
        # Symmetric to the last bit, or the gradient is not H times the error.
        return {"H": (h + h.T) / 2, "c": torch.randn(dim, generator=generator)}

    def init(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": torch.randn(dim, generator=generator)}

    def batches(
        config: Any, generator: torch.Generator, steps: int, split: str = "train"
    ) -> Tensor:
        check_split(split)
        return torch.randn(steps, dim, generator=generator)

    def loss(data: Any, config: Any, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        error = params["x"] - (config["c"] + noise * batch)
        return 0.5 * error @ config["H"] @ error

    return TaskFamily((), sample, init, batches, loss)


def quadratic_optimum(config: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The parameters of least loss of a `quadratic` without noise, and that loss, zero."""
    return {"x": config["c"]}, torch.zeros_like(config["c"][0])


def quadratic_losses(
    config: dict[str, Tensor], lr: Tensor | float, params: dict[str, Tensor], steps: int
) -> Tensor:
    """The losses of gradient descent on a `quadratic` without noise, in closed form.

    With eigenvalues h of H and e the initial error in its eigenvectors, the loss after t steps is
    ``1/2 sum_i h_i (1 - lr h_i)^(2 t) e_i^2``.

    Args:
        config: of the task.
        lr: learning rate, a scalar.
        params: where it starts.
        steps: number of losses T.

    Returns:
        (T,), the loss before each update, as ``losses`` of `fmeta.unroll` with
        `fmeta.optimizers.sgd`; differentiable in ``lr`` and ``params``.
    """
    curvature, energy = _modes(config, params)
    shrink = (1 - lr * curvature).square()
    t = torch.arange(steps, device=curvature.device)
    return 0.5 * shrink ** t[:, None] @ (curvature * energy)


def quadratic_meta_gradient(
    config: dict[str, Tensor], lr: Tensor | float, params: dict[str, Tensor], steps: int
) -> Tensor:
    """The derivative of each of the `quadratic_losses` by the learning rate.

    After t steps ``-t sum_i h_i^2 (1 - lr h_i)^(2 t - 1) e_i^2``. Arguments as there.

    Returns:
        (T,); its sum is the meta-gradient of the summed loss.
    """
    curvature, energy = _modes(config, params)
    shrink = 1 - lr * curvature
    t = torch.arange(steps, device=curvature.device)[:, None]
    powers = shrink ** (2 * t - 1).clamp(min=0)  # the first loss has derivative 0, whatever it is
    return -(t * powers) @ (curvature.square() * energy)


def _modes(config: dict[str, Tensor], params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues of H, and the squared error along each eigenvector."""
    eigenvalues, basis = torch.linalg.eigh(config["H"])
    return eigenvalues, ((params["x"] - config["c"]) @ basis).square()
