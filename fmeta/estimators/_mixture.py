"""One estimator over several families: each structure gets trainings of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.distributed import Ranks, Share, dealt
from fmeta.estimators._arguments import checked_seed
from fmeta.estimators._averages import squared_norm
from fmeta.estimators._contract import Estimate, Estimator
from fmeta.random import fold_in
from fmeta.tasks import Mixture, TaskFamily

__all__ = ["over_families", "shares"]

# Metrics with a row for each task.
_BY_TASK = ("diverged", "diverged_at", "drawn", "residual", "slope")


def shares(total: int, weights: tuple[float, ...]) -> list[int]:
    """``total`` in whole parts after ``weights``, at least one each, by largest remainders.

    Raises:
        ValueError: fewer than there are weights.
    """
    if total < len(weights):
        raise ValueError(
            f"a mixture of {len(weights)} families needs at least as many tasks (or particles), "
            f"got {total}"
        )
    left = total - len(weights)
    exact = [w / sum(weights) * left for w in weights]
    parts = [int(x) for x in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: left - sum(parts)]:
        parts[i] += 1
    return [1 + n for n in parts]


def over_families(
    build: Callable[[TaskFamily, Share], Estimator],
    family: TaskFamily | Mixture,
    total: int,
    ranks: Ranks,
) -> Estimator:
    """The estimator of a family, or the mean of those of a mixture's families.

    Args:
        build: ``build(family, share) -> Estimator``.
        family: one, or a mixture.
        total: the number (of tasks, or of particles) to be shared.
        ranks: who makes an estimate together.

    Returns:
        An `Estimator`; for a mixture its state is a tuple, a family's part has a seed of its own,
        and metrics have the families' tasks one after the other, told apart by ``"family"``.
    """
    if isinstance(family, TaskFamily):
        return build(family, Share(ranks, total))
    if not isinstance(family, Mixture):
        raise TypeError(
            f"family must be a TaskFamily or a mixture of them, got {type(family).__name__}: "
            "call one of fmeta.tasks, as digits()"
        )
    given = dealt(ranks, shares(total, family.weights))
    parts = [build(f, share) for f, share in zip(family.families, given, strict=True)]

    def init(meta_params: Any, seed: int) -> tuple[Any, ...]:
        seeds = [fold_in(checked_seed(seed), i).initial_seed() % 2**62 for i in range(len(parts))]
        return tuple(p.init(meta_params, s) for p, s in zip(parts, seeds, strict=True))

    def estimate(meta_params: Any, state: tuple[Any, ...]) -> tuple[Estimate, tuple[Any, ...]]:
        if not isinstance(state, tuple) or len(state) != len(parts):
            raise TypeError(
                f"the state is no tuple of the states of {len(parts)} families: give what this "
                "estimator's own init, or its last estimate, returned"
            )
        pairs = [p.estimate(meta_params, s) for p, s in zip(parts, state, strict=True)]
        return _mean([e for e, _ in pairs]), tuple(s for _, s in pairs)

    def gather(state: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(p.gather(s) for p, s in zip(parts, state, strict=True))

    def scatter(state: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(p.scatter(s) for p, s in zip(parts, state, strict=True))

    return Estimator(init, estimate, ranks, gather, scatter)


def _mean(estimates: list[Estimate]) -> Estimate:
    """Weighted by the tasks that did not diverge."""
    kept = torch.stack([(~e.metrics["diverged"]).sum() for e in estimates]).double()
    weights = kept / kept.sum()

    def total(*terms: Tensor) -> Tensor:
        # A family all of whose tasks diverged has NaN here and weight 0. No family has a weight
        # when all have diverged, and then the sum is NaN as well.
        kept_terms = [torch.where(w == 0, 0.0, x) for w, x in zip(weights, terms, strict=True)]
        return torch.stack(kept_terms).sum(0)

    def mean(*xs: Tensor) -> Tensor:
        return total(*[(w * x).to(x.dtype) for w, x in zip(weights, xs, strict=True)])

    loss, grads = trees.map(mean, *[(e.loss, e.grads) for e in estimates])
    errors = [e.metrics["standard_error"] for e in estimates]
    error = total(*[(w * x).square() for w, x in zip(weights, errors, strict=True)]).sqrt()
    device = loss.device
    sizes = [len(e.metrics["diverged"]) for e in estimates]
    metrics: dict[str, Any] = {
        name: torch.cat([e.metrics[name] for e in estimates])
        for name in _BY_TASK
        if name in estimates[0].metrics
    }
    # (tasks, T), or (K, tasks, copies).
    losses = [e.metrics["losses"] for e in estimates]
    metrics["losses"] = torch.cat(losses, losses[0].ndim - 2)
    of_tasks = [i for i, n in enumerate(sizes) for _ in range(n)]
    metrics["family"] = torch.tensor(of_tasks, device=device)
    metrics["standard_error"] = error
    metrics["signal_to_noise"] = squared_norm(grads).sqrt() / error
    return Estimate(loss, grads, metrics)
