"""What evolution strategies over pieces of long trainings have in common: all but the scheme."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.distributed import Ranks, Share
from fmeta.estimators._advance import by_steps
from fmeta.estimators._arguments import check_arguments, check_state, checked_seed
from fmeta.estimators._averages import first_bad_step, gathered_tasks, mean_over_tasks
from fmeta.estimators._contract import (
    Bind,
    Estimate,
    Estimator,
    MetaLoss,
    bind_opt_params,
    check_meta_params,
    last_loss,
    scored,
)
from fmeta.estimators._draws import Draws
from fmeta.estimators._horizons import Horizon
from fmeta.estimators._mixture import over_families
from fmeta.estimators._noise import Noise, Perturb, Std
from fmeta.estimators._perturbations import (
    Scheme,
    perturbations,
    relative_losses,
    weighted_sums,
)
from fmeta.estimators._plan import clock_of_all, configs_by_step, drawn_at, inner_step_at
from fmeta.estimators._stepper import Stepper, idle
from fmeta.estimators._trainings import gathered, scattered, trainings_of, without_diverged
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily
from fmeta.tasks._family import device_of_tasks

__all__ = ["EvolutionState", "evolution"]

Tree = Any


class EvolutionState(NamedTuple):
    """Trainings in progress, each by perturbed copies of the meta-parameters.

    Attributes:
        params, hidden: ``(tasks, copies, ...)``, the copies (+, -), or + alone.
        config, t, horizon, drawn: of the tasks, ``(tasks, ...)``, see `Trainings`.
        xi: sum of the perturbations that each training has seen, like ``meta_params`` with a
            leading dimension of tasks, on each rank those of all ranks unless the ranks exchange
            gradients; ``()`` for a scheme that does not sum them.
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


def evolution(
    scheme: Scheme,
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int | Sequence[int] | Horizon,
    truncation: int,
    std: Std,
    num_particles: int | None,
    antithetic: bool,
    bind: Bind | None,
    meta_loss: MetaLoss | None,
    eval_split: str | None,
    stagger: bool,
    perturb: Perturb | None,
    chunk_size: int | None,
    trace: bool,
    compile: bool,
    ranks: Ranks | None = None,
) -> Estimator:
    """The estimator of a scheme; the arguments are those of `fmeta.estimators.pes`."""
    check_arguments(
        optimizer,
        num_tasks=num_tasks,
        truncation=truncation,
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
    particles = num_tasks if num_particles is None else num_particles
    if num_tasks % particles:
        raise ValueError(
            f"num_tasks must be a multiple of num_particles, got {num_tasks} and {particles}"
        )
    if compile and not trace:
        raise ValueError(
            "compile=True compiles the recorded step, so it goes with trace=True alone"
        )
    noise = Noise(std, perturb)
    each, particles = int(num_tasks // particles), int(particles)  # NumPy's integers are taken too

    def build(family: TaskFamily, particles: Share) -> Estimator:
        if not antithetic and particles.total < 2:
            raise ValueError(
                "antithetic=False compares the loss of a particle with the mean of the others', so "
                f"each family needs at least 2, got {particles.total}: give more num_tasks and "
                "num_particles"
            )
        advance = by_steps(
            optimizer,
            family,
            evaluate=eval_split is not None,
            chunk_size=chunk_size,
            trace=trace,
            compile=compile,
        )
        stepper = Stepper(optimizer, bind or bind_opt_params, advance)
        share = particles.times(each)
        mine = share.worked_on
        together = {"tasks": 1, "particle": each, "all": share.total}[scheme.together]
        draws = Draws(
            family, len(mine), horizon, truncation, eval_split, stagger, together, mine.start
        )
        copies = 2 if antithetic else 1
        return _of_family(scheme, draws, stepper, share, noise, meta_loss or last_loss, copies)

    return over_families(build, family, particles, ranks or Ranks.alone())


def _of_family(
    scheme: Scheme,
    draws: Draws,
    stepper: Stepper,
    share: Share,
    noise: Noise,
    score: MetaLoss,
    copies: int,
) -> Estimator:
    family, each = draws.family, share.each
    mine = slice(share.worked_on.start, share.worked_on.stop)
    # Ranks draw each other's perturbations again, or add up what they multiplied their own by.
    redraws = share.ranks.redraws or share.ranks.size == 1

    def init(meta_params: Tree, seed: int) -> EvolutionState:
        check_meta_params(meta_params)
        noise.check(meta_params)
        seed = checked_seed(seed)
        xi: Tree = ()
        with torch.no_grad():
            trainings = idle(draws, stepper, meta_params, seed, copies)
            if scheme.accumulates:
                rows = share.total if redraws else len(share.worked_on)
                xi = trees.map(lambda x: x.new_zeros(rows, *x.shape), meta_params)
        return EvolutionState(*trainings, xi, 0, seed)

    def estimate(meta_params: Tree, state: EvolutionState) -> tuple[Estimate, EvolutionState]:
        check_meta_params(meta_params)
        check_state(state, EvolutionState, tasks=draws.num_tasks, copies=copies)
        _check_sums(state.xi, scheme)
        now = trainings_of(state)
        with torch.no_grad():
            plan = draws.plan(state.seed, state.step, now, device_of_tasks(family, meta_params))
            found = perturbations(
                meta_params,
                clock_of_all(share, plan) if redraws else plan,
                scheme,
                noise,
                seed=state.seed,
                step=state.step,
                each=each,
                before=state.xi,
            )

            def perturbed(k: int) -> Tree:
                """What the members have from step k on, ``(tasks, copies, ...)``."""

                def copied(x: Tensor, eps: Tensor) -> Tensor:
                    own = eps[row[k]]
                    return torch.stack([x + own, x - own][:copies], 1)

                return trees.map(copied, meta_params, found.eps)

            row = found.row[:, mine] if redraws else found.row
            table = [rows[mine] for rows in found.table] if redraws else found.table
            edges = [k for k in found.edges[1:] if table[k] != table[k - 1]]
            later = {k: partial(perturbed, k) for k in edges}
            after, losses, evals = stepper.run(perturbed(0), now, plan, later)
            config = partial(configs_by_step, plan)
            values = scored(score, losses, evals, plan.t, plan.horizon, config)
            bad_step = first_bad_step(losses, evals, values)
            metrics = {"losses": losses, "drawn": drawn_at(plan, bad_step)}
            at = inner_step_at(plan, bad_step)
            if redraws:
                seen, metrics = gathered_tasks(share, (values.movedim(1, 0), at), metrics)
                values, at = seen[0].movedim(0, 1), seen[1]
                relative = relative_losses(values, each)
            elif copies == 2:
                relative = relative_losses(values, each)
            else:  # a loss counts relative to those of all other particles
                seen = share.gather(values.movedim(1, 0)).movedim(0, 1)
                relative = relative_losses(seen, each)[:, mine]
            parts = weighted_sums(relative, found, meta_params, noise)
            estimate = mean_over_tasks(
                values.mean((0, 2)),
                parts,
                at,
                metrics,
                group=each,
                share=None if redraws else share,
            )
            after = without_diverged(after, share.part(estimate.metrics["diverged"]))
            xi = trees.map(lambda x: x[found.row[-1]], found.xi) if scheme.accumulates else ()
        return estimate, EvolutionState(*after, xi, state.step + 1, state.seed)

    def gather(state: EvolutionState) -> EvolutionState:
        xi = state.xi if redraws else share.gather(state.xi, to_first=True)
        found: EvolutionState = gathered(share, state)
        return found if xi is None else found._replace(xi=xi)

    def scatter(state: EvolutionState) -> EvolutionState:
        found: EvolutionState = scattered(share, state)
        return found if redraws else found._replace(xi=share.part(state.xi))

    return Estimator(init, estimate, share.ranks, gather, scatter)


def _check_sums(xi: Tree, scheme: Scheme) -> None:
    """Raises a ValueError for a state with sums where the scheme has none, or without."""
    has_sums = xi != () if isinstance(xi, tuple) else True
    if has_sums != scheme.accumulates:
        raise ValueError(
            "the state is of another evolution strategy: this one "
            + ("sums" if scheme.accumulates else "does not sum")
            + " the perturbations of a training; give what its own init, or its last estimate, "
            "returned"
        )
