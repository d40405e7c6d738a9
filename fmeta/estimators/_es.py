"""Truncated evolution strategies: a smoothed gradient of pieces of long trainings, and biased."""

from __future__ import annotations

from collections.abc import Sequence

from fmeta.distributed import Ranks
from fmeta.estimators._contract import Bind, Estimator, MetaLoss
from fmeta.estimators._evolution import evolution
from fmeta.estimators._horizons import Horizon
from fmeta.estimators._noise import PERTURBATION, Name, Perturb, Std
from fmeta.estimators._perturbations import Scheme
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily

__all__ = ["es"]


def es(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int | Sequence[int] | Horizon,
    truncation: int,
    std: Std = 0.01,
    num_particles: int | None = None,
    antithetic: bool = True,
    bind: Bind | None = None,
    meta_loss: MetaLoss | None = None,
    eval_split: str | None = None,
    stagger: bool = True,
    perturb: Perturb | None = None,
    chunk_size: int | None = None,
    trace: bool = True,
    compile: bool = False,
    ranks: Ranks | None = None,
) -> Estimator:
    """Evolution strategies on a truncation of K steps of trainings that go on between estimates.

    As `pes`, but each estimate looks at its own truncation only: the difference of the losses of
    two copies of a task is multiplied by the perturbation ``eps`` under which they were made,
    ``sum_i eps_i (L+_i - L-_i) / (2 num_tasks std^2)``. What ``eps`` does to the losses after its
    truncation is cut off, as in `truncated`, and the estimate is biased in the same way, towards
    what pays off at once; in return it is less noisy than those without. It has no such bias where
    K is a multiple of the horizon (of each, of several): then it is plain evolution strategies on
    whole trainings.

    Args:
        optimizer, family, num_tasks, horizon, truncation, std: as in `pes`; a fresh perturbation
            of each particle in each estimate.
        num_particles, antithetic, bind, meta_loss, eval_split: as in `pes`.
        stagger, perturb, chunk_size, trace, compile, ranks: as in `pes`.

    Returns:
        An `Estimator`, with the metrics of `pes`.

    Raises:
        ValueError, TypeError: as in `pes`.

    Reference:
        Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning"
        (1703.03864); Metz et al., "Understanding and correcting pathologies in the training of
        learned optimizers" (1810.10180), on truncations of inner training.
    """
    return evolution(
        Scheme(_name, accumulates=False),
        optimizer,
        family,
        num_tasks=num_tasks,
        horizon=horizon,
        truncation=truncation,
        std=std,
        num_particles=num_particles,
        antithetic=antithetic,
        bind=bind,
        meta_loss=meta_loss,
        eval_split=eval_split,
        stagger=stagger,
        perturb=perturb,
        chunk_size=chunk_size,
        trace=trace,
        compile=compile,
        ranks=ranks,
    )


def _name(seed: int, step: int, particle: int, drawn: Sequence[int], t: int) -> Name:
    return seed, step, particle, PERTURBATION
