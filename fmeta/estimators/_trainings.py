"""Inner trainings in progress: drawn, advanced by a truncation, started anew when they are over.

Estimators that work on a piece of inner training at a time keep these between two estimates.
Everything that is random, and which training ends when, is settled on the CPU beforehand
(`plan`); what is left is the same step over and over, for all trainings at once (`Stepper`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._trace import Traced
from fmeta._unroll import InnerState, inner_step
from fmeta.estimators._contract import Bind, bound_pair
from fmeta.optimizer import Optimizer
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily, loss_of_task, sample_batches, sample_task, stack_tasks
from fmeta.tasks._family import device_of_tasks

__all__ = ["Draws", "Plan", "Stepper", "Trainings"]

Tree = Any
Horizon = int | Sequence[int]

_HORIZON = 3  # after config, init and batches of `fmeta.tasks`: last of the integers of the draw


class Trainings(NamedTuple):
    """Inner trainings side by side: ``(tasks, copies, ...)``, copies of a task share its batches.

    Attributes:
        params, hidden: of the models and their optimizers, ``(tasks, copies, ...)``.
        config: of the tasks, ``(tasks, ...)``.
        t: steps made, ``(tasks,)``; a training with ``t >= horizon`` is over.
        horizon: steps to make, ``(tasks,)``.
        drawn: the integers ``(estimate, task, start)`` that with the seed fix a task: ``(tasks,
            3)``.
    """

    params: Any
    hidden: Any
    config: Any
    t: Tensor
    horizon: Tensor
    drawn: Tensor


class Start(NamedTuple):
    """Tasks that begin at step ``k`` of a truncation; ``index`` says in which places."""

    k: int
    index: Tensor
    config: Any
    params: Any
    horizon: Tensor
    drawn: Tensor


class Plan(NamedTuple):
    """All that a truncation of K steps needs to know beforehand.

    Attributes:
        starts: in order of ``k``.
        batches, eval_batches: leading dimensions ``(K, tasks)``; ``()`` for none.
        is_new: whether a task's training begins with step k, ``(K, tasks)``.
        t, horizon: of step k, ``(K, tasks)``.
    """

    starts: list[Start]
    batches: Any
    eval_batches: Any
    is_new: Tensor
    t: Tensor
    horizon: Tensor


class Draws:
    """Draws tasks, batches and horizons, each from ``fold_in(seed, estimate, task, start, ...)``.

    Args:
        family: where the tasks come from.
        num_tasks: how many run side by side.
        horizon: steps of a training: a number, or a choice of numbers of which each training gets
            one.
        truncation: steps K of an estimate.
        eval_split: the split of evaluation batches; None: none.
        stagger: whether the first trainings end early, each at a multiple of K of its own, so that
            later ones are not all at the same step.
    """

    def __init__(
        self,
        family: TaskFamily,
        num_tasks: int,
        horizon: Horizon,
        truncation: int,
        eval_split: str | None,
        stagger: bool,
    ) -> None:
        self.family, self.num_tasks, self.truncation = family, num_tasks, truncation
        self.horizons = (horizon,) if isinstance(horizon, int) else tuple(horizon)
        self.eval_split, self.stagger = eval_split, stagger

    def first(self, seed: int, device: torch.device | None) -> Start:
        """The tasks of the start of all."""
        drawn = [(0, i, 0) for i in range(self.num_tasks)]
        return self._start(seed, 0, drawn, device)

    def first_t(self, seed: int, horizon: Tensor) -> Tensor:
        """Where the first trainings are taken to be: the later, the sooner they end."""
        if not self.stagger:
            return torch.zeros_like(horizon)
        offsets = []
        for i, steps in enumerate(horizon.tolist()):
            pieces = max(1, steps // self.truncation)
            pick = torch.randint(pieces, (), generator=fold_in(seed, i, _HORIZON))
            offsets.append(int(pick) * self.truncation)
        return torch.tensor(offsets, device=horizon.device)

    def plan(self, seed: int, step: int, now: Trainings, device: torch.device | None) -> Plan:
        """What happens in estimate ``step``, whose trainings begin as ``now``."""
        starts: dict[int, list[tuple[int, int, int]]] = {}
        rows, evals, clock = [], [], []
        pairs = zip(now.t.tolist(), now.horizon.tolist(), strict=True)
        for i, (t, horizon) in enumerate(pairs):
            pieces, shown, steps, k, count = [], [], [], 0, 0
            config = trees.map(lambda x, i=i: x[i].cpu(), now.config)
            drawn = (step, i, 0)
            while k < self.truncation:
                if t >= horizon:
                    count += 1
                    drawn = (step, i, count)
                    starts.setdefault(k, []).append(drawn)
                    config = self.family.sample(fold_in(seed, *drawn, 0))
                    t, horizon = 0, self._horizon(seed, drawn)
                length = min(horizon - t, self.truncation - k)
                args = (self.family, config, length, seed, *drawn)
                pieces.append(sample_batches(*args))
                if self.eval_split is not None:
                    shown.append(sample_batches(*args, split=self.eval_split))
                steps += [(t + j, horizon) for j in range(length)]
                t, k = t + length, k + length
            rows.append(_concatenated(pieces))
            evals.append(_concatenated(shown) if shown else ())
            clock.append(steps)
        ticks = torch.tensor(clock, device=device).movedim(1, 0)
        is_new = torch.zeros(ticks.shape[:2], dtype=torch.bool)
        for k, drawn_here in starts.items():
            is_new[k, [i for _, i, _ in drawn_here]] = True
        return Plan(
            [self._start(seed, k, starts[k], device) for k in sorted(starts)],
            _by_step(stack_tasks(rows, device)),
            _by_step(stack_tasks(evals, device)) if self.eval_split is not None else (),
            is_new.to(device or "cpu"),
            *ticks.unbind(-1),
        )

    def _horizon(self, seed: int, drawn: tuple[int, int, int]) -> int:
        if len(self.horizons) == 1:
            return self.horizons[0]
        pick = torch.randint(len(self.horizons), (), generator=fold_in(seed, *drawn, _HORIZON))
        return self.horizons[int(pick)]

    def _start(
        self, seed: int, k: int, drawn: list[tuple[int, int, int]], device: torch.device | None
    ) -> Start:
        tasks = stack_tasks([sample_task(self.family, 1, seed, *d) for d in drawn], device)
        horizon = torch.tensor([self._horizon(seed, d) for d in drawn], device=device)
        index = torch.tensor([i for _, i, _ in drawn], device=device)
        numbers = torch.tensor(drawn, device=device)
        return Start(k, index, tasks.config, tasks.model_params, horizon, numbers)


class Stepper:
    """Starts trainings and advances them, all members (tasks x copies) by one `vmap`.

    Args:
        optimizer: the rule that trains.
        family: of the tasks.
        bind: of the estimator.
        evaluate: whether each update is followed by an evaluation.
        chunk_size: members worked on together; None: all.
        trace: whether the step is recorded once as a flat list of operations and replayed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        family: TaskFamily,
        bind: Bind,
        *,
        evaluate: bool,
        chunk_size: int | None = None,
        trace: bool = False,
        first_order: bool | str = False,
    ) -> None:
        loss_fn = loss_of_task(family)
        inner = inner_step(optimizer, loss_fn, first_order=first_order)
        self.bind, self.optimizer = bind, optimizer

        def one(
            opt_params: Tree, params: Tree, hidden: Tree, config: Tree, batch: Tree, shown: Tree
        ) -> tuple[Tree, Tree, Tensor, Any]:
            state, metrics = inner(
                opt_params, InnerState(params, hidden), batch, loss_args=(config,)
            )
            if not evaluate:
                return state.params, state.hidden, metrics["loss"], ()
            seen = optimizer.eval_params(opt_params, state.params, state.hidden)
            return state.params, state.hidden, metrics["loss"], loss_fn(seen, shown, config)

        self.step: Callable[..., Any] = torch.vmap(one, chunk_size=chunk_size)
        if trace:
            self.step = Traced(self.step)

    def begin(self, meta_params: Tree, start: Start) -> tuple[Tree, Tree, Tree]:
        """First parameters and hidden states of the tasks of ``start``.

        Args:
            meta_params: ``(those tasks, copies, ...)``.
            start: which tasks.

        Returns:
            ``(opt_params, params, hidden)``, each ``(those tasks, copies, ...)``.
        """

        def one(meta_params: Tree, config: Tree, params: Tree, horizon: Tensor) -> Any:
            opt_params, own = bound_pair(self.bind, meta_params, config)
            params = params if own is None else own
            hidden = self.optimizer.init_hidden(opt_params, params, num_steps=horizon)
            return opt_params, params, hidden

        by_copy = torch.vmap(one, in_dims=(0, None, None, None))
        return torch.vmap(by_copy)(meta_params, start.config, start.params, start.horizon)

    def run(
        self, meta_params: Tree, now: Trainings, plan: Plan
    ) -> tuple[Trainings, Tensor, Tensor | None]:
        """One truncation.

        Args:
            meta_params: ``(tasks, copies, ...)``.
            now: the trainings at its beginning.
            plan: of `Draws.plan`.

        Returns:
            ``(trainings, losses, eval_losses)``, losses ``(K, tasks, copies)``.
        """
        tasks, copies = trees.leaves(now.params)[0].shape[:2]
        opt_params = self._bound(meta_params, now.config)
        losses, evals = [], []
        starts = {start.k: start for start in plan.starts}
        members = lambda tree: trees.map(lambda x: x.flatten(0, 1), tree)  # noqa: E731
        spread = lambda tree: trees.map(  # noqa: E731
            lambda x: x.repeat_interleave(copies, 0), tree
        )
        theta, state = members(opt_params), (members(now.params), members(now.hidden))
        config = spread(now.config)
        batches, shown = _spread(plan.batches, copies), _spread(plan.eval_batches, copies)
        for k in range(plan.is_new.shape[0]):
            if k in starts:
                now = self._restarted(meta_params, _gathered(now, state, tasks), starts[k])
                theta = members(self._bound(meta_params, now.config))
                state, config = (members(now.params), members(now.hidden)), spread(now.config)
            batch, seen = (trees.map(lambda x, k=k: x[k], tree) for tree in (batches, shown))
            params, hidden, loss, value = self.step(theta, *state, config, batch, seen)
            state = params, hidden
            losses.append(loss)
            evals.append(value)
        now = _gathered(now, state, tasks)._replace(t=plan.t[-1] + 1)
        shape = (len(losses), tasks, copies)
        shown_losses = torch.stack(evals).reshape(shape) if isinstance(evals[0], Tensor) else None
        return now, torch.stack(losses).reshape(shape), shown_losses

    def _bound(self, meta_params: Tree, config: Tree) -> Tree:
        def one(meta_params: Tree, config: Tree) -> Tree:
            return bound_pair(self.bind, meta_params, config)[0]

        return torch.vmap(torch.vmap(one, in_dims=(0, None)))(meta_params, config)

    def _restarted(self, meta_params: Tree, now: Trainings, start: Start) -> Trainings:
        mine = trees.map(lambda x: x[start.index], meta_params)
        _, params, hidden = self.begin(mine, start)
        new = (params, hidden, start.config, torch.zeros_like(start.horizon), *start[-2:])
        return trees.map(lambda old, x: old.index_copy(0, start.index, x), now, Trainings(*new))


def _gathered(now: Trainings, state: tuple[Tree, Tree], tasks: int) -> Trainings:
    params, hidden = trees.map(lambda x: x.unflatten(0, (tasks, -1)), state)
    return now._replace(params=params, hidden=hidden)


def _spread(batches: Tree, copies: int) -> Tree:
    return trees.map(lambda x: x.repeat_interleave(copies, 1), batches)


def _by_step(batches: Tree) -> Tree:
    return trees.map(lambda x: x.movedim(1, 0).contiguous(), batches)


def _concatenated(pieces: list[Tree]) -> Tree:
    if len(pieces) == 1:
        return pieces[0]
    return trees.map(lambda *xs: torch.cat(xs), *pieces)


def first_trainings(
    draws: Draws, stepper: Stepper, meta_params: Tree, seed: int, copies: int
) -> Trainings:
    """The trainings that an estimator begins with, none of which has made a step."""
    device = device_of_tasks(draws.family, meta_params)
    start = draws.first(seed, device)
    spread = trees.map(lambda x: x.expand(draws.num_tasks, copies, *x.shape), meta_params)
    _, params, hidden = stepper.begin(spread, start)
    t = draws.first_t(seed, start.horizon)
    return Trainings(params, hidden, start.config, t, start.horizon, start.drawn)
