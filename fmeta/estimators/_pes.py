"""Persistent evolution strategies: an unbiased meta-gradient from pieces of long trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.estimators._contract import (
    Bind,
    Estimate,
    Estimator,
    MetaLoss,
    bind_opt_params,
    check_horizon,
    check_sizes,
    last_loss,
)
from fmeta.estimators._averages import find_diverged, mean_over_tasks
from fmeta.estimators._mixture import over_families
from fmeta.estimators._trainings import Draws, Stepper, Trainings, first_trainings
from fmeta.optimizer import Optimizer, check_optimizer_type
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily
from fmeta.tasks._family import device_of_tasks

__all__ = ["pes", "pes_gradient"]

Tree = Any
_PERTURBATION = 4  # last of the integers of the draw


class PESState(NamedTuple):
    """Trainings in progress, each by two opposite perturbations of the meta-parameters.

    Attributes:
        params, hidden: ``(tasks, 2, ...)``, the second dimension is (+, -).
        config, t, horizon, drawn: of the tasks, ``(tasks, ...)``.
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
    family: Any,
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
        stagger: the first trainings end early, at different steps, so that later ones are not all
            at the same point.
        perturb: ``perturb(meta_params, step, particle) -> eps``, in place of normal draws.
        chunk_size: members (pairs count twice) that are worked on together; None: all.
        trace: the inner step is recorded once and replayed, with the same results; False where
            ``family.loss`` or the rule are no pure functions of tensors.

    Returns:
        An `Estimator`. All draws of estimate k and task i come from ``(seed, k, i)``. Metrics:
        ``"losses"`` ``(K, tasks, 2)``; ``"signal_to_noise"``, the norm of the mean over tasks over
        the norm of its standard error; ``"diverged"`` ``(tasks,)``, pairs with a loss that is not
        finite, left out of loss and gradient and started anew in the next estimate;
        ``"diverged_at"``, the first such step within the truncation, or -1; ``"drawn"``, the
        integers with which `fmeta.tasks.sample_task` gives the task again.

    Raises:
        ValueError: numbers below 1, ``std`` not above 0, particles that do not divide the tasks.

    Reference:
        Vicol et al., "Unbiased gradient estimation in unrolled computation graphs with persistent
        evolution strategies" (2112.13835), algorithm 2; resets within a truncation as in
        google/learned_optimization.
    """
    check_optimizer_type(optimizer, "optimizer")
    particles = num_tasks if num_particles is None else num_particles
    check_sizes(
        num_tasks=num_tasks, truncation=truncation, num_particles=particles, chunk_size=chunk_size
    )
    check_horizon(horizon)
    if not std > 0:
        raise ValueError(f"std must be above 0, got {std}")
    if num_tasks % particles:
        raise ValueError(
            f"num_tasks must be a multiple of num_particles, got {num_tasks} and {particles}"
        )
    score = meta_loss or last_loss
    each = num_tasks // particles

    def build(family: TaskFamily, particles: int) -> Estimator:
        stepper = Stepper(
            optimizer,
            family,
            bind or bind_opt_params,
            evaluate=eval_split is not None,
            chunk_size=chunk_size,
            trace=trace,
        )
        draws = Draws(family, particles * each, horizon, truncation, eval_split, stagger)
        return _of_family(draws, stepper, particles, each, std, score, perturb)

    return over_families(build, family, particles)


def _of_family(
    draws: Draws,
    stepper: Stepper,
    particles: int,
    each: int,
    std: float,
    score: MetaLoss,
    perturb: Callable[[Tree, int, int], Tree] | None,
) -> Estimator:
    family, num_tasks = draws.family, draws.num_tasks

    def noise(meta_params: Tree, seed: int, step: int) -> Tree:
        """``(tasks, ...)``; the tasks of a particle share it."""
        device = device_of_tasks(family, meta_params)

        def normal(particle: int) -> Tree:
            generator = fold_in(seed, step, particle, _PERTURBATION)
            return trees.map(
                lambda x: std * torch.randn(x.shape, generator=generator, dtype=x.dtype),
                meta_params,
            )

        drawn = [perturb(meta_params, step, i) if perturb else normal(i) for i in range(particles)]
        return trees.map(
            lambda x: x.to(device or x.device).repeat_interleave(each, 0), trees.stack(drawn)
        )

    def init(meta_params: Tree, seed: int) -> PESState:
        with torch.no_grad():
            first = first_trainings(draws, stepper, meta_params, int(seed), 2)
            xi = trees.map(lambda x: x.new_zeros(num_tasks, *x.shape), meta_params)
        return PESState(*first, xi, 0, int(seed))

    def estimate(meta_params: Tree, state: PESState) -> tuple[Estimate, PESState]:
        device = device_of_tasks(family, meta_params)
        now = Trainings(*state[: len(Trainings._fields)])
        with torch.no_grad():
            plan = draws.plan(state.seed, state.step, now, device)
            eps = noise(meta_params, state.seed, state.step)
            both = trees.map(lambda x, e: torch.stack([x + e, x - e], 1), meta_params, eps)
            after, losses, evals = stepper.run(both, now, plan)
            t, steps = plan.t.unsqueeze(-1), plan.horizon.unsqueeze(-1)
            values = score(losses, evals, t, steps).expand_as(losses)
            diverged, diverged_at = find_diverged(losses, evals, values)
            kept = ~diverged
            safe = torch.where(kept.unsqueeze(-1), values, 0.0)
            parts, xi = torch.vmap(pes_gradient)(
                safe.movedim(1, 0), plan.is_new.movedim(1, 0), state.xi, eps
            )
            grads, ratio = mean_over_tasks(trees.map(lambda x: x / (2 * std**2), parts), kept)
            loss = safe.mean((0, 2)).sum() / kept.sum()
            # What diverged is over: its next estimate begins with a fresh task.
            after = after._replace(t=torch.where(diverged, after.horizon, after.t))
        metrics = {
            "losses": losses,
            "signal_to_noise": ratio,
            "diverged": diverged,
            "diverged_at": diverged_at,
            "drawn": now.drawn,
        }
        new = PESState(*after, xi, state.step + 1, state.seed)
        return Estimate(loss, grads, metrics), new

    return Estimator(init, estimate)


def pes_gradient(
    losses: Tensor, is_new: Tensor, accumulator: Tree, eps: Tree, mask: Tensor | None = None
) -> tuple[Tree, Tree]:
    """The part of one pair in the estimate, without the division by ``2 std^2``.

    Args:
        losses: ``(K, 2)``, of (+, -).
        is_new: ``(K,)``, whether a fresh training begins with the step; its loss counts as new.
        accumulator: sum of the perturbations before this truncation.
        eps: of this truncation, included the deviation.
        mask: ``(K,)``, weights of the steps; default 1.

    Returns:
        ``(part, accumulator)``.
    """
    weight = torch.ones_like(losses[:, 0]) if mask is None else mask
    difference = (losses[:, 0] - losses[:, 1]) * weight / weight.sum()
    over = is_new.to(difference.dtype).cumsum(0) > 0
    new = torch.where(over, difference, 0.0).sum()
    last = difference.sum() - new
    total = trees.map(lambda a, e: a + e, accumulator, eps)
    part = trees.map(lambda a, e: last * a + new * e, total, eps)
    return part, trees.map(lambda a, e: torch.where(over[-1], e, a), total, eps)
