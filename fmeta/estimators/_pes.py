"""Persistent evolution strategies: an unbiased meta-gradient from pieces of long trainings."""

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

__all__ = ["pes"]


def pes(
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
    """Persistent evolution strategies, all trainings of all particles by one `vmap`.

    Each task is trained by two copies, with meta-parameters ``+eps`` and ``-eps``; every estimate
    advances them by a truncation of K steps under a fresh ``eps ~ N(0, std^2)`` and weighs the
    difference of their losses by ``xi``, the sum of the perturbations since the training began:
    ``sum_i xi_i (L+_i - L-_i) / (2 num_tasks std^2)``. So no part of a long training is cut off
    from the meta-gradient, as in truncated ES, and no graph is built. A training that is over
    begins anew within the truncation, on a fresh task.

    Args:
        optimizer: the rule being learned, or the one under which something else is.
        family: where the tasks come from; of a `fmeta.tasks.mixture` each family gets its share
            of the tasks.
        num_tasks: tasks trained side by side, each by a pair of copies.
        horizon: inner steps of a training, several numbers of which each training gets one, or a
            schedule (`fmeta.estimators.log_uniform`, ``growing``).
        truncation: inner steps K of an estimate.
        std: standard deviation of the perturbations: a number, or a tree like ``meta_params`` of a
            number (or a tensor that broadcasts) for each tensor.
        num_particles: pairs of perturbations; each is tried on ``num_tasks / num_particles``
            tasks. Default: one for each task.
        antithetic: opposite perturbations in pairs, whose errors of even order cancel. False: one
            copy a task and half the cost; its loss counts as far as it is above the mean of the
            other particles' (so there must be some), which is much noisier for small ``std``.
        bind: ``bind(meta_params, config) -> (opt_params, model_params or None)``; says what is
            learned. Default: ``meta_params`` are the optimizer's parameters; ``None`` means that
            models start by ``family.init``.
        meta_loss: ``meta_loss(losses, eval_losses, t, horizon)``, elementwise on tensors ``(K,
            tasks, copies)``: a step's part in the meta-loss, of which the mean over steps counts.
            Default: ``eval_losses`` with ``eval_split``, else ``losses``.
        eval_split: the split from which a batch is evaluated after each inner step; None: none.
        stagger: the first trainings end early, so that later ones are not all at the same point.
            They do it by beginning at a later t (a multiple of K, with models that are fresh all
            the same), as in google/learned_optimization: a ``meta_loss`` that depends on t sees
            late steps of untrained models in the first estimates. False: all begin at 0.
        perturb: ``perturb(meta_params, step, particle) -> eps``, in place of normal draws.
        chunk_size: members (pairs count twice) that are worked on together, through the whole
            truncation: about as many as fit the cache; None: all.
        trace: the inner step is recorded once and replayed, with the same results; False where
            ``family.loss`` or the rule are no pure functions of tensors.
        compile: what was recorded is compiled: about twice as fast, after 15 to 40 seconds for
            each family (and again in each process); equal to rounding only.
        ranks: who share the particles (`fmeta.distributed.joined`); default this process alone.
            They exchange losses, and draw each other's perturbations again.

    Returns:
        An `Estimator`. All draws of estimate k and task i come from ``(seed, k, i)``. Metrics are
        those of `Estimate`, with ``"losses"`` ``(K, tasks, copies)``; tasks of one particle enter
        the standard error together. A pair that diverged begins anew in the next estimate.

    Raises:
        ValueError: numbers below 1, ``std`` not above 0, particles that do not divide the tasks,
            one particle without its opposite, ``compile`` without ``trace``, an optimizer that
            needs what the family's ``extras`` do not give; later, a ``meta_loss`` or a start of
            another shape, a state of other trainings.
        TypeError: no optimizer, no family, no function (or one of other arguments), no flag; later,
            a meta-parameter that is no floating tensor, a seed that is no integer, a state of
            another estimator.

    Reference:
        Vicol et al., "Unbiased gradient estimation in unrolled computation graphs with persistent
        evolution strategies" (2112.13835), algorithm 2; resets within a truncation as in
        google/learned_optimization.
    """
    return evolution(
        Scheme(_name, accumulates=True),
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
