"""Persistent evolution strategies: an unbiased meta-gradient from pieces of long trainings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.estimators._advance import by_steps
from fmeta.estimators._averages import first_bad_step, mean_over_tasks
from fmeta.estimators._contract import (
    Bind,
    Estimate,
    Estimator,
    MetaLoss,
    bind_opt_params,
    check_horizon,
    check_meta_params,
    check_sizes,
    last_loss,
    scored,
)
from fmeta.estimators._mixture import over_families
from fmeta.estimators._trainings import (
    Draws,
    Stepper,
    drawn_at,
    idle,
    inner_step_at,
    trainings_of,
    without_diverged,
)
from fmeta.optimizer import Optimizer, check_optimizer_type
from fmeta.random import fold_in
from fmeta.tasks import Mixture, TaskFamily
from fmeta.tasks._family import device_of_tasks

__all__ = ["pes", "pes_gradient"]

Tree = Any
_PERTURBATION = 4  # last of the integers of the draw


class PESState(NamedTuple):
    """Trainings in progress, each by two opposite perturbations of the meta-parameters.

    Attributes:
        params, hidden: ``(tasks, 2, ...)``, the second dimension is (+, -).
        config, t, horizon, drawn: of the tasks, ``(tasks, ...)``, see `Trainings`.
        xi: sum of the perturbations that each training has seen, like ``meta_params`` with a
            leading dimension of tasks.
        step: estimates made.
        seed: of the run.
    """

    params: Any
    hidden: Any
    config: Any
    t: Tensor
    horizon: Tensor
    drawn: Tensor
    xi: Any
    step: int
    seed: int


def pes(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int | Sequence[int],
    truncation: int,
    std: float = 0.01,
    num_particles: int | None = None,
    bind: Bind | None = None,
    meta_loss: MetaLoss | None = None,
    eval_split: str | None = None,
    stagger: bool = True,
    perturb: Callable[[Tree, int, int], Tree] | None = None,
    chunk_size: int | None = None,
    trace: bool = True,
    compile: bool = False,
) -> Estimator:
    """Antithetic persistent evolution strategies, all trainings of all particles by one `vmap`.

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
        horizon: inner steps of a training, or several numbers of which each training gets one.
        truncation: inner steps K of an estimate.
        std: standard deviation of the perturbations.
        num_particles: pairs of perturbations; each is tried on ``num_tasks / num_particles``
            tasks. Default: one for each task.
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

    Returns:
        An `Estimator`. All draws of estimate k and task i come from ``(seed, k, i)``. Metrics are
        those of `Estimate`, with ``"losses"`` ``(K, tasks, 2)``; tasks of one particle enter the
        standard error together. A pair that diverged begins anew in the next estimate.

    Raises:
        ValueError: numbers below 1, ``std`` not above 0, particles that do not divide the tasks,
            an optimizer that needs what the family's ``extras`` do not give; later, a ``meta_loss``
            of another shape.
        TypeError: no optimizer, no family; later, a meta-parameter that is no floating tensor.

    Reference:
        Vicol et al., "Unbiased gradient estimation in unrolled computation graphs with persistent
        evolution strategies" (2112.13835), algorithm 2; resets within a truncation as in
        google/learned_optimization.
    """
    check_optimizer_type(optimizer, "optimizer")
    particles = num_tasks if num_particles is None else num_particles
    check_sizes(
        num_tasks=num_tasks,
        truncation=truncation,
        num_particles=particles,
        chunk_size=chunk_size,
    )
    check_horizon(horizon)
    if not 0 < std < math.inf:
        raise ValueError(f"std must be positive and finite, got {std}")
    if num_tasks % particles:
        raise ValueError(
            f"num_tasks must be a multiple of num_particles, got {num_tasks} and {particles}"
        )
    score = meta_loss or last_loss
    each = num_tasks // particles

    def build(family: TaskFamily, particles: int) -> Estimator:
        advance = by_steps(
            optimizer,
            family,
            evaluate=eval_split is not None,
            chunk_size=chunk_size,
            trace=trace,
            compile=compile,
        )
        stepper = Stepper(optimizer, bind or bind_opt_params, advance)
        draws = Draws(family, particles * each, horizon, truncation, eval_split, stagger)
        return _of_family(draws, stepper, particles, std, score, perturb)

    return over_families(build, family, particles)


def _of_family(
    draws: Draws,
    stepper: Stepper,
    particles: int,
    std: float,
    score: MetaLoss,
    perturb: Callable[[Tree, int, int], Tree] | None,
) -> Estimator:
    family, num_tasks = draws.family, draws.num_tasks
    each = num_tasks // particles

    def normal(meta_params: Tree, seed: int, step: int, particle: int) -> Tree:
        generator = fold_in(seed, step, particle, _PERTURBATION)
        return trees.map(
            lambda x: std * torch.randn(x.shape, generator=generator, dtype=x.dtype), meta_params
        )

    def noise(meta_params: Tree, seed: int, step: int) -> Tree:
        """``(tasks, ...)``; the tasks of a particle share it."""
        if perturb is None:
            drawn = [normal(meta_params, seed, step, i) for i in range(particles)]
        else:
            drawn = [perturb(meta_params, step, i) for i in range(particles)]
            for eps in drawn:
                trees.match(meta_params, eps, "what perturb returned", allow_none=False)
        return trees.map(
            lambda x, e: e.to(x.device).repeat_interleave(each, 0), meta_params, trees.stack(drawn)
        )

    def init(meta_params: Tree, seed: int) -> PESState:
        check_meta_params(meta_params)
        with torch.no_grad():
            trainings = idle(draws, stepper, meta_params, int(seed), 2)
            xi = trees.map(lambda x: x.new_zeros(num_tasks, *x.shape), meta_params)
        return PESState(*trainings, xi, 0, int(seed))

    def estimate(meta_params: Tree, state: PESState) -> tuple[Estimate, PESState]:
        check_meta_params(meta_params)
        now = trainings_of(state)
        with torch.no_grad():
            plan = draws.plan(state.seed, state.step, now, device_of_tasks(family, meta_params))
            eps = noise(meta_params, state.seed, state.step)
            both = trees.map(lambda x, e: torch.stack([x + e, x - e], 1), meta_params, eps)
            after, losses, evals = stepper.run(both, now, plan)
            values = scored(score, losses, evals, plan.t, plan.horizon)
            weighed, xi = torch.vmap(pes_gradient)(
                values.movedim(1, 0), plan.is_new.movedim(1, 0), state.xi, eps
            )
            parts = trees.map(lambda x, m: (x / (2 * std**2)).to(m.dtype), weighed, meta_params)
            bad_step = first_bad_step(losses, evals, values)
            metrics = {"losses": losses, "drawn": drawn_at(plan, bad_step)}
            at = inner_step_at(plan, bad_step)
            estimate = mean_over_tasks(values.mean((0, 2)), parts, at, metrics, group=each)
            after = without_diverged(after, estimate.metrics["diverged"])
        return estimate, PESState(*after, xi, state.step + 1, state.seed)

    return Estimator(init, estimate)


def pes_gradient(
    losses: Tensor, is_new: Tensor, accumulator: Tree, eps: Tree, mask: Tensor | None = None
) -> tuple[Tree, Tree]:
    """The part of one pair in the estimate, without the division by ``2 std^2``.

    Args:
        losses: ``(K, 2)``, of (+, -).
        is_new: ``(K,)``, whether a fresh training begins with the step; its loss counts as new.
        accumulator: sum of the perturbations before this truncation.
        eps: perturbation of this truncation, of deviation ``std``.
        mask: ``(K,)``, weights of the steps; default 1.

    Returns:
        ``(part, accumulator)``, the accumulator for the next truncation.
    """
    weight = torch.ones_like(losses[:, 0]) if mask is None else mask
    difference = (losses[:, 0] - losses[:, 1]) * weight / weight.sum()
    over = is_new.to(difference.dtype).cumsum(0) > 0
    new = torch.where(over, difference, 0.0).sum()
    last = difference.sum() - new
    total = trees.map(lambda a, e: a + e, accumulator, eps)
    part = trees.map(lambda a, e: last * a + new * e, total, eps)
    return part, trees.map(lambda a, e: torch.where(over[-1], e, a), total, eps)
