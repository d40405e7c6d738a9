"""One estimator over several families: each structure gets trainings of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.estimators._averages import noise_ratio
from fmeta.estimators._contract import Estimate, Estimator
from fmeta.random import fold_in
from fmeta.tasks import Mixture, TaskFamily

__all__ = ["over_families", "shares"]


def shares(total: int, weights: tuple[float, ...]) -> list[int]:
    """``total`` in whole parts after ``weights``, at least one each, by largest remainders.

    Raises:
        ValueError: fewer than there are weights.
    """
    if total < len(weights):
        raise ValueError(
            f"a mixture of {len(weights)} families needs at least as many tasks, got {total}"
        )
    exact = [w / sum(weights) * (total - len(weights)) for w in weights]
    parts = [int(x) for x in exact]
    order = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in order[: total - len(weights) - sum(parts)]:
        parts[i] += 1
    return [1 + n for n in parts]


def over_families(
    build: Callable[[TaskFamily, int], Estimator], family: TaskFamily | Mixture, total: int
) -> Estimator:
    """The estimator of a family, or the mean of those of a mixture's families.

    Args:
        build: ``build(family, number) -> Estimator``.
        family: one, or a mixture.
        total: the number (of tasks, or of particles) to be shared.

    Returns:
        An `Estimator`; for a mixture its state is a tuple, a family's part has a seed of its own,
        and metrics have the families' tasks one after the other, told apart by ``"family"``.
    """
    if isinstance(family, TaskFamily):
        return build(family, total)
    if not isinstance(family, Mixture):
        raise TypeError(
            f"family must be a TaskFamily or a mixture of them, got {type(family).__name__}"
        )
    numbers = shares(total, family.weights)
    parts = [build(f, n) for f, n in zip(family.families, numbers, strict=True)]

    def init(meta_params: Any, seed: int) -> tuple[Any, ...]:
        seeds = [fold_in(seed, i).initial_seed() % 2**62 for i in range(len(parts))]
        return tuple(p.init(meta_params, s) for p, s in zip(parts, seeds, strict=True))

    def estimate(meta_params: Any, state: tuple[Any, ...]) -> tuple[Estimate, tuple[Any, ...]]:
        pairs = [p.estimate(meta_params, s) for p, s in zip(parts, state, strict=True)]
        return _mean([e for e, _ in pairs]), tuple(s for _, s in pairs)

    return Estimator(init, estimate)


def _mean(estimates: list[Estimate]) -> Estimate:
    """Weighted by the tasks that did not diverge."""
    kept = torch.stack([(~e.metrics["diverged"]).sum() for e in estimates])
    weights = kept / kept.sum()

    def mean(*xs: Tensor) -> Tensor:
        # A family all of whose tasks diverged has NaN here, and weight 0.
        terms = [torch.where(w > 0, w * x, 0.0) for w, x in zip(weights, xs, strict=True)]
        return torch.stack(terms).sum(0).to(xs[0].dtype) + 0 * weights.sum().to(xs[0].dtype)

    grads = trees.map(mean, *[e.grads for e in estimates])
    variances = [_variance(e) for e in estimates]
    variance = mean(*[w * v for w, v in zip(weights, variances, strict=True)])
    metrics: dict[str, Any] = {}
    for name in estimates[0].metrics:
        values = [e.metrics[name] for e in estimates]
        if values[0].ndim:
            axis = 1 if name == "losses" and values[0].ndim == 3 else 0
            metrics[name] = torch.cat(values, axis)
    sizes = torch.tensor([len(e.metrics["diverged"]) for e in estimates])
    metrics["family"] = torch.arange(len(sizes)).repeat_interleave(sizes)
    metrics["signal_to_noise"] = noise_ratio(grads, variance)
    return Estimate(mean(*[e.loss for e in estimates]), grads, metrics)


def _variance(estimate: Estimate) -> Tensor:
    """Of the mean gradient, from its ratio to its standard error."""
    square = torch.stack([x.double().square().sum() for x in trees.leaves(estimate.grads)]).sum()
    return square / estimate.metrics["signal_to_noise"].square()
