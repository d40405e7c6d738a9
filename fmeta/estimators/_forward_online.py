"""Forward mode over trainings that go on between estimates: real-time recurrent learning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.distributed import Ranks, Share
from fmeta.estimators._advance import by_unroll
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
from fmeta.estimators._mixture import over_families
from fmeta.estimators._plan import Plan, configs_by_step, drawn_at, inner_step_at
from fmeta.estimators._pushed import basis, by_leaf, pushed
from fmeta.estimators._stepper import Stepper, idle
from fmeta.estimators._trainings import Trainings, trainings_of, without_diverged
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily
from fmeta.tasks._family import device_of_tasks

__all__ = ["online"]

Tree = Any


class OnlineState(NamedTuple):
    """Trainings in progress, and their derivatives by each meta-parameter.

    Attributes:
        params, hidden: ``(tasks, 1, ...)``.
        config, t, horizon, drawn: of the tasks, ``(tasks, ...)``, see `Trainings`.
        tangents: of ``(params, hidden)``, ``(tasks, elements, 1, ...)``.
        step: estimates made.
        seed: of the run.
    """

    params: Any
    hidden: Any
    config: Any
    t: Tensor
    horizon: Tensor
    drawn: Tensor
    tangents: Any
    step: int
    seed: int


def online(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int | Sequence[int],
    truncation: int,
    bind: Bind | None,
    meta_loss: MetaLoss | None,
    eval_split: str | None,
    stagger: bool,
    chunk_size: int | None,
    first_order: bool | str,
    ranks: Ranks | None,
) -> Estimator:
    """`fmeta.estimators.forward` with a truncation; arguments as there."""
    check_arguments(
        optimizer,
        num_tasks=num_tasks,
        truncation=truncation,
        bind=bind,
        meta_loss=meta_loss,
        eval_split=eval_split,
        stagger=stagger,
        chunk_size=chunk_size,
        ranks=ranks,
    )

    def build(family: TaskFamily, share: Share) -> Estimator:
        advance = by_unroll(
            optimizer,
            family,
            evaluate=eval_split is not None,
            chunk_size=chunk_size,
            first_order=first_order,
        )
        stepper = Stepper(optimizer, bind or bind_opt_params, advance)
        mine = share.worked_on
        draws = Draws(
            family, len(mine), horizon, truncation, eval_split, stagger, first_task=mine.start
        )
        return _of_family(draws, stepper, meta_loss or last_loss, share)

    return over_families(build, family, num_tasks, ranks or Ranks.alone())


def _of_family(draws: Draws, stepper: Stepper, score: MetaLoss, share: Share) -> Estimator:
    family = draws.family

    def init(meta_params: Tree, seed: int) -> OnlineState:
        check_meta_params(meta_params)
        seed = checked_seed(seed)
        count = sum(x.numel() for x in trees.leaves(meta_params))
        with torch.no_grad():
            now = idle(draws, stepper, meta_params, seed, 1)
            tangents = trees.map(
                lambda x: x.new_zeros(len(x), count, *x.shape[1:]), (now.params, now.hidden)
            )
        return OnlineState(*now, tangents, 0, seed)

    def estimate(meta_params: Tree, state: OnlineState) -> tuple[Estimate, OnlineState]:
        check_meta_params(meta_params)
        check_state(state, OnlineState, tasks=draws.num_tasks, copies=1)
        now = trainings_of(state)
        with torch.no_grad():
            plan = draws.plan(state.seed, state.step, now, device_of_tasks(family, meta_params))

            def run(
                meta_params: Tree, params: Tree, hidden: Tree, now: Trainings, plan: Plan
            ) -> tuple[Tree, Tree]:
                own = trees.map(lambda x: x.expand(draws.num_tasks, 1, *x.shape), meta_params)
                going_on = now._replace(params=params, hidden=hidden)
                after, losses, evals = stepper.run(own, going_on, plan)
                config = partial(configs_by_step, plan)
                values = scored(score, losses, evals, plan.t, plan.horizon, config)
                part = values.mean((0, 2))
                rest = (after[2:], losses, evals, values)
                return (after.params, after.hidden, part), rest

            (params, hidden, part), (*tops, slopes), (rest, losses, evals, values) = pushed(
                run,
                (meta_params, now.params, now.hidden),
                (basis(meta_params), *_swapped(state.tangents)),
                (now, plan),
            )
            after = Trainings(params, hidden, *rest)
            bad_step = first_bad_step(losses, evals, values)
            metrics = {"losses": losses, "drawn": drawn_at(plan, bad_step)}
            parts, at = by_leaf(slopes, meta_params), inner_step_at(plan, bad_step)
            estimate = mean_over_tasks(part, parts, at, metrics, share=share)
            after = without_diverged(after, share.part(estimate.metrics["diverged"]))
            tangents = _swapped(tuple(tops))
            # Strides decide how products are rounded: those that a file would give it.
            fresh = trees.map(
                lambda x: x.clone(memory_format=torch.contiguous_format), (*after, tangents)
            )
        return estimate, OnlineState._make((*fresh, state.step + 1, state.seed))

    def gather(state: OnlineState) -> OnlineState:
        found = share.gather(tuple(state[:7]), to_first=True)
        return state if found is None else OnlineState._make((*found, *state[7:]))

    def scatter(state: OnlineState) -> OnlineState:
        return OnlineState._make((*share.part(tuple(state[:7])), *state[7:]))

    return Estimator(init, estimate, share.ranks, gather, scatter)


def _swapped(tree: Tree) -> Tree:
    return trees.map(lambda x: x.transpose(0, 1), tree)
