"""Noise-reuse evolution strategies, and the family of estimators between them and PES."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fmeta.distributed import Ranks
from fmeta.estimators._contract import Bind, Estimator, MetaLoss, check_sizes
from fmeta.estimators._evolution import evolution
from fmeta.estimators._horizons import Horizon
from fmeta.estimators._noise import PERTURBATION, Name, Perturb, Std
from fmeta.estimators._perturbations import Scheme
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily

__all__ = ["name_of_training", "nres"]


def nres(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int | Sequence[int] | Horizon,
    truncation: int,
    std: Std = 0.01,
    reuse: int | None = None,
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
    """Evolution strategies whose perturbations are kept while a training lasts, at any phase of it.

    A training draws its perturbation ``eps`` when it begins and keeps it to its end. Every estimate
    advances all trainings by a truncation of K steps, wherever each of them is, and is ``sum_i
    eps_i (L+_i - L-_i) / (2 num_tasks std^2)`` of the losses of these steps. Since ``eps`` is what
    has shaped the training so far, no part of it is cut off, as in `pes`, and the noise is less:
    where perturbations of the w truncations up to now would change the losses by ``sum_v g_v
    eps_v``, the variance of a pair's part is ``(d + 1) |sum_v g_v|^2`` for d meta-parameters, that
    of `pes` ``d w sum_v |g_v|^2 + |sum_v g_v|^2``, which is never less (to first order).

    A pair's part is that of `es_single`. What differs is when trainings begin: here each for
    itself, with horizons of its own and at different phases (``stagger``), so that one estimate
    sees all phases of training and is unbiased by itself (but for terms of order ``std^2``, and for
    what a change of ``meta_params`` within a training does).

    Args:
        optimizer, family, num_tasks, horizon, truncation, std: as in `pes`.
        reuse: inner steps for which a perturbation is kept; None: the whole training. With a
            number a training draws a fresh one every so many steps, and its losses are weighed by
            the sum of those it has seen: generalised PES, of which `pes` is the case ``reuse =
            truncation`` (for horizons that are multiples of it).
        num_particles: perturbations; tasks of one particle begin together, with one horizon.
        antithetic, bind, meta_loss, eval_split, stagger: as in `pes`.
        perturb: as in `pes`; ``step`` is the estimate in which the training begins. Not with
            ``reuse``.
        chunk_size, trace, compile, ranks: as in `pes`.

    Returns:
        An `Estimator`, with the metrics of `pes`.

    Raises:
        ValueError, TypeError: as in `pes`; also for ``reuse`` below 1 or with ``perturb``.

    Reference:
        Li et al., "Variance-reduced gradient estimation via noise-reuse in online evolution
        strategies" (2304.12180); ``reuse`` is the K of their GPES_K.
    """
    check_sizes(reuse=reuse)
    scheme = Scheme(name_of_training, accumulates=False, together="particle")
    if reuse is not None:
        if perturb is not None:
            raise ValueError(
                "perturb goes without reuse: it is told the estimate in which a training begins, "
                "not which of its perturbations is wanted"
            )
        scheme = Scheme(_name_of_piece(reuse), accumulates=True, together="particle")
    return evolution(
        scheme,
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


def name_of_training(seed: int, step: int, particle: int, drawn: Sequence[int], t: int) -> Name:
    """One name for a whole training: of the estimate in which, and as which, it began."""
    return seed, drawn[1], particle, drawn[3], PERTURBATION


def _name_of_piece(reuse: int) -> Callable[[int, int, int, Sequence[int], int], Name]:
    def name(seed: int, step: int, particle: int, drawn: Sequence[int], t: int) -> Name:
        return *name_of_training(seed, step, particle, drawn, t), t // reuse

    return name
