"""The steps of a truncation, for all trainings side by side, and how trainings begin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.estimators._advance import Advance
from fmeta.estimators._contract import Bind, bound_pair, bound_start
from fmeta.estimators._draws import Draws
from fmeta.estimators._plan import Plan, Start
from fmeta.estimators._trainings import Trainings
from fmeta.optimizer import Optimizer
from fmeta.tasks._family import device_of_tasks

__all__ = ["Stepper", "idle"]

Tree = Any


class Stepper:
    """Begins trainings and advances them, all members (tasks x copies) at once.

    Args:
        optimizer: the rule that trains.
        bind: of the estimator.
        advance: how steps are made, `by_steps` or `by_unroll`.
    """

    def __init__(self, optimizer: Optimizer, bind: Bind, advance: Advance) -> None:
        self.optimizer, self.bind, self.advance = optimizer, bind, advance

    def begin(self, meta_params: Tree, start: Start) -> tuple[Tree, Tree]:
        """First parameters and hidden states of the trainings of ``start``.

        Args:
            meta_params: ``(those trainings, copies, ...)``.
            start: which trainings.

        Returns:
            ``(params, hidden)``, each ``(those trainings, copies, ...)``.
        """

        def one(meta_params: Tree, config: Tree, params: Tree, horizon: Tensor) -> Any:
            opt_params, params = bound_start(self.bind, meta_params, config, params)
            return params, self.optimizer.init_hidden(opt_params, params, num_steps=horizon)

        by_copy = torch.vmap(one, in_dims=(0, None, None, None))
        params, hidden = torch.vmap(by_copy)(meta_params, start.config, start.params, start.horizon)
        return params, hidden

    def run(
        self,
        meta_params: Tree,
        now: Trainings,
        plan: Plan,
        later: Mapping[int, Callable[[], Tree]] | None = None,
    ) -> tuple[Trainings, Tensor, Tensor | None]:
        """One truncation.

        Args:
            meta_params: ``(tasks, copies, ...)``.
            now: the trainings at its beginning.
            plan: of `Draws.plan`.
            later: what gives the ``meta_params`` of step k and those after it, by k; None: the
                same throughout.

        Returns:
            ``(trainings, losses, eval_losses)``, losses ``(K, tasks, copies)``.
        """
        steps, tasks = plan.is_new.shape
        copies = trees.leaves(meta_params)[0].shape[1]
        batches, shown = (_spread(b, 1, copies) for b in (plan.batches, plan.eval_batches))
        params, hidden, config = now[:3]
        losses, evals = [], []
        starts = {start.k: start for start in plan.starts}
        edges = sorted({0, steps, *starts, *(later or ())})
        for k, end in itertools.pairwise(edges):
            if later and k in later:
                meta_params = later[k]()
            if k in starts:
                params, hidden, config = self._begun(
                    meta_params, (params, hidden, config), starts[k]
                )
            state, loss, value = self._advanced(
                (self._bound(meta_params, config), params, hidden),
                _spread(config, 0, copies),
                *(trees.map(lambda x, k=k, end=end: x[k:end], b) for b in (batches, shown)),
            )
            params, hidden = trees.map(lambda x: x.unflatten(0, (tasks, copies)), state)
            losses.append(loss.unflatten(1, (tasks, copies)))
            if value is not None:
                evals.append(value.unflatten(1, (tasks, copies)))
        after = Trainings(params, hidden, config, plan.t[-1] + 1, plan.horizon[-1], plan.drawn[-1])
        return after, torch.cat(losses), torch.cat(evals) if evals else None

    def _advanced(
        self, state: tuple[Tree, Tree, Tree], config: Tree, batches: Tree, shown: Tree
    ) -> tuple[tuple[Tree, Tree], Tensor, Tensor | None]:
        members = trees.map(lambda x: x.flatten(0, 1), state)
        params, hidden, losses, evals = self.advance(*members, config, batches, shown)
        return (params, hidden), losses, evals

    def _bound(self, meta_params: Tree, config: Tree) -> Tree:
        def one(meta_params: Tree, config: Tree) -> Tree:
            return bound_pair(self.bind, meta_params, config)[0]

        return torch.vmap(torch.vmap(one, in_dims=(0, None)))(meta_params, config)

    def _begun(self, meta_params: Tree, now: tuple[Tree, Tree, Tree], start: Start) -> Any:
        params, hidden = self.begin(trees.map(lambda x: x[start.places], meta_params), start)
        return trees.map(
            lambda old, new: old.index_copy(0, start.places, new),
            now,
            (params, hidden, start.config),
        )


def idle(draws: Draws, stepper: Stepper, meta_params: Tree, seed: int, copies: int) -> Trainings:
    """Trainings that are over without a step, so that the first estimate begins all of them.

    A training must begin within an estimate: how it begins can depend on the meta-parameters.
    """
    start = draws.first(seed, device_of_tasks(draws.family, meta_params))
    spread = trees.map(lambda x: x.expand(draws.num_tasks, copies, *x.shape), meta_params)
    params, hidden = stepper.begin(spread, start)
    drawn = [(seed, 0, i, 1) for i in draws.indices]
    horizon = start.horizon
    return Trainings(
        params, hidden, start.config, horizon, horizon, torch.tensor(drawn, device=horizon.device)
    )


def _spread(tree: Tree, dim: int, copies: int) -> Tree:
    return trees.map(lambda x: x.repeat_interleave(copies, dim), tree)
