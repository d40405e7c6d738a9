"""ES-Single: one perturbation for the whole of each training, all trainings in step."""

from __future__ import annotations

from collections.abc import Sequence

from fmeta.distributed import Ranks
from fmeta.estimators._contract import Bind, Estimator, MetaLoss
from fmeta.estimators._evolution import evolution
from fmeta.estimators._horizons import Horizon
from fmeta.estimators._noise import Perturb, Std
from fmeta.estimators._nres import name_of_training
from fmeta.estimators._perturbations import Scheme
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily

__all__ = ["es_single"]


def es_single(
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
    perturb: Perturb | None = None,
    chunk_size: int | None = None,
    trace: bool = True,
    compile: bool = False,
    ranks: Ranks | None = None,
) -> Estimator:
    """Evolution strategies whose perturbations are kept while a training lasts, in lock step.

    A particle draws its perturbation ``eps`` when its trainings begin and keeps it to their end.
    Each estimate advances them by a truncation of K steps and adds that part of the losses,
    ``sum_i eps_i (L+_i - L-_i) / (2 num_tasks std^2)``: evolution strategies on the whole of
    training, interrupted every K steps for an outer step. The sum over a training's truncations is
    exactly what evolution strategies on the whole would give, so while ``meta_params`` do not
    change it is unbiased (but for terms of order ``std^2``), and as noisy as that, however many
    truncations there are.

    A pair's part is that of `nres`. What differs is when trainings begin: here all at once and of
    one horizon, as in the paper, where the particles work through one inner problem together. So
    one estimate sees one phase of training only, the first steps with all tasks, then the next.
    The mean over a whole training is unbiased, each of its estimates by itself is not.

    Args:
        optimizer, family, num_tasks, horizon, truncation, std: as in `pes`; a horizon that is drawn
            is drawn for all trainings together.
        num_particles, antithetic, bind, meta_loss, eval_split: as in `pes`.
        perturb: as in `pes`; ``step`` is the estimate in which the training begins.
        chunk_size, trace, compile, ranks: as in `pes`.

    Returns:
        An `Estimator`, with the metrics of `pes`. A pair that diverged begins anew in the next
        estimate, and is then out of step with the others.

    Raises:
        ValueError, TypeError: as in `pes`.

    Reference:
        Vicol, Kolter and Swersky, "Low-variance gradient estimation in unrolled computation graphs
        with ES-Single" (2304.11153).
    """
    return evolution(
        Scheme(name_of_training, accumulates=False, together="all"),
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
        stagger=False,
        perturb=perturb,
        chunk_size=chunk_size,
        trace=trace,
        compile=compile,
        ranks=ranks,
    )
