"""Truncated backpropagation: the exact meta-gradient of pieces of long trainings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._autodiff import grad_and_value
from fmeta._inner_step import check_modes
from fmeta.distributed import Ranks, Share
from fmeta.estimators._advance import by_steps, by_unroll
from fmeta.estimators._arguments import check_arguments, check_state, checked_seed
from fmeta.estimators._averages import first_bad_step, mean_over_tasks
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
from fmeta.estimators._plan import Plan, configs_by_step, drawn_at, inner_step_at
from fmeta.estimators._stepper import Stepper, idle
from fmeta.estimators._trainings import (
    Trainings,
    gathered,
    scattered,
    trainings_of,
    without_diverged,
)
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily
from fmeta.tasks._family import device_of_tasks

__all__ = ["truncated"]

Tree = Any


class TruncatedState(NamedTuple):
    """Trainings in progress.

    Attributes:
        params, hidden: ``(tasks, 1, ...)``.
        config, t, horizon, drawn: of the tasks, ``(tasks, ...)``, see `Trainings`.
        step: estimates made.
        seed: of the run.
    """

    params: Any
    hidden: Any
    config: Any
    t: Tensor
    horizon: Tensor
    drawn: Tensor
    step: int
    seed: int


def truncated(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int | Sequence[int] | Horizon,
    truncation: int,
    bind: Bind | None = None,
    meta_loss: MetaLoss | None = None,
    eval_split: str | None = None,
    stagger: bool = True,
    first_order: bool | str = False,
    checkpoint: str | int | None = None,
    mixed_mode: bool | str = False,
    recompute: str | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
    ranks: Ranks | None = None,
) -> Estimator:
    """Meta-gradient through a truncation of K steps of trainings that go on between estimates.

    Memory and time of an estimate are those of K steps, however long the trainings are. What a
    step does to the losses after its truncation is cut off, so the estimate is biased towards
    what pays off at once. It is exact where K is a multiple of the horizon (of each, of several):
    then an estimate consists of whole trainings. A training that is over begins anew within the
    truncation, on a fresh task.

    Args:
        optimizer: the rule being learned, or the one under which something else is.
        family: where the tasks come from; of a `fmeta.tasks.mixture` each family gets its share
            of the tasks.
        num_tasks: trainings side by side.
        horizon: inner steps of a training, several numbers of which each training gets one, or a
            schedule (`fmeta.estimators.log_uniform`, ``growing``).
        truncation: inner steps K of an estimate.
        bind: ``bind(meta_params, config) -> (opt_params, model_params or None)``; says what is
            learned. Default: ``meta_params`` are the optimizer's parameters; ``None`` means that
            models start by ``family.init``. Learned initial parameters have a gradient in the
            truncation that begins the training only.
        meta_loss: ``meta_loss(losses, eval_losses, t, horizon)``, elementwise on tensors ``(K,
            tasks, 1)``: a step's part in the meta-loss, of which the mean over steps counts.
            Default: ``eval_losses`` with ``eval_split``, else ``losses``.
        eval_split: the split from which a batch is evaluated after each inner step; None: none.
        stagger: the first trainings end early, so that later ones are not all at the same point.
            They do it by beginning at a later t (a multiple of K, with models that are fresh all
            the same), as in google/learned_optimization: a ``meta_loss`` that depends on t sees
            late steps of untrained models in the first estimates. False: all begin at 0.
        first_order, checkpoint, mixed_mode, recompute: as in `fmeta.unroll`.
        chunk_size: tasks whose steps are made together, as in `torch.vmap`; None: all.
        compile: the inner step and its derivative are recorded and compiled, once for each family
            (and again in each process), after a minute or more; equal to rounding only. For pure
            functions of tensors; not with ``checkpoint``, ``mixed_mode`` or ``recompute``.
        ranks: who share the tasks (`fmeta.distributed.joined`); default this process alone.

    Returns:
        An `Estimator`. All draws of estimate k and task i come from ``(seed, k, i)``. Metrics are
        those of `Estimate`, with ``"losses"`` ``(K, tasks, 1)``. A training that diverged begins
        anew in the next estimate.

    Raises:
        ValueError: numbers below 1, an optimizer that needs what the family's ``extras`` do not
            give, fewer tasks than families, ``compile`` with ``checkpoint``, ``mixed_mode`` or
            ``recompute``, one of the latter two that is unknown, or both of the gradient; later, a
            ``meta_loss`` or a start of another shape, a state of other trainings, and options that
            `fmeta.unroll` refuses.
        TypeError: no optimizer, no family, no function (or one of other arguments), no flag; later,
            a meta-parameter that is no floating tensor, a seed that is no integer, a state of
            another estimator.

    Reference:
        Wu et al., "Understanding short-horizon bias in stochastic meta-optimization" (1803.02021),
        on the bias.
    """
    check_arguments(
        optimizer,
        num_tasks=num_tasks,
        truncation=truncation,
        bind=bind,
        meta_loss=meta_loss,
        eval_split=eval_split,
        stagger=stagger,
        chunk_size=chunk_size,
        compile=compile,
        ranks=ranks,
    )
    check_modes(recompute, mixed_mode)
    if compile and (checkpoint is not None or mixed_mode or recompute is not None):
        raise ValueError(
            "compile=True goes with neither checkpoint nor mixed_mode nor recompute: leave one out"
        )

    def build(family: TaskFamily, share: Share) -> Estimator:
        common: Any = {
            "evaluate": eval_split is not None,
            "chunk_size": chunk_size,
            "first_order": first_order,
        }
        if compile:
            advance = by_steps(optimizer, family, **common, compile=True, differentiated=True)
        else:
            options: Any = {
                "checkpoint": checkpoint,
                "mixed_mode": mixed_mode,
                "recompute": recompute,
            }
            advance = by_unroll(optimizer, family, **common, **options)
        stepper = Stepper(optimizer, bind or bind_opt_params, advance)
        mine = share.worked_on
        draws = Draws(
            family, len(mine), horizon, truncation, eval_split, stagger, first_task=mine.start
        )
        return _of_family(draws, stepper, meta_loss or last_loss, share)

    return over_families(build, family, num_tasks, ranks or Ranks.alone())


def _of_family(draws: Draws, stepper: Stepper, score: MetaLoss, share: Share) -> Estimator:
    family = draws.family

    def total(meta_params: Tree, now: Trainings, plan: Plan) -> tuple[Tensor, Any]:
        after, losses, evals = stepper.run(meta_params, now, plan)
        config = functools.partial(configs_by_step, plan)
        values = scored(score, losses, evals, plan.t, plan.horizon, config)
        return values.mean((0, 2)).sum(), (after, losses, evals, values)

    def init(meta_params: Tree, seed: int) -> TruncatedState:
        check_meta_params(meta_params)
        seed = checked_seed(seed)
        with torch.no_grad():
            return TruncatedState(*idle(draws, stepper, meta_params, seed, 1), 0, seed)

    def estimate(meta_params: Tree, state: TruncatedState) -> tuple[Estimate, TruncatedState]:
        check_meta_params(meta_params)
        check_state(state, TruncatedState, tasks=draws.num_tasks, copies=1)
        now = trainings_of(state)
        with torch.no_grad():  # nothing outside is being differentiated: plain autograd inside
            plan = draws.plan(state.seed, state.step, now, device_of_tasks(family, meta_params))
            # Each task has meta-parameters of its own, so the gradient of the sum is that of each.
            own = trees.map(lambda x: x.expand(draws.num_tasks, 1, *x.shape), meta_params)
            parts, (_, (after, losses, evals, values)) = grad_and_value(total, own, now, plan)
            bad_step = first_bad_step(losses, evals, values)
            metrics = {"losses": losses, "drawn": drawn_at(plan, bad_step)}
            parts = trees.map(lambda x: x.squeeze(1), parts)
            at = inner_step_at(plan, bad_step)
            estimate = mean_over_tasks(values.mean((0, 2)), parts, at, metrics, share=share)
            after = without_diverged(after, share.part(estimate.metrics["diverged"]))
        return estimate, TruncatedState(*after, state.step + 1, state.seed)

    return Estimator(
        init,
        estimate,
        share.ranks,
        functools.partial(gathered, share),
        functools.partial(scattered, share),
    )
