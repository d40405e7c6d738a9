"""Inner trainings in progress: drawn, advanced by a truncation, begun anew when they are over.

Estimators that work on a piece of inner training at a time keep these between two estimates.
Everything that is random, and which training ends when, is settled on the CPU beforehand
(`Draws.plan`); what is left is the same step over and over, for all trainings at once (`Stepper`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.distributed import Share
from fmeta.estimators._advance import Advance
from fmeta.estimators._contract import Bind, bound_pair, bound_start
from fmeta.estimators._horizons import Horizon, as_horizon
from fmeta.optimizer import Optimizer
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily, sample_batches, sample_task, stack_tasks
from fmeta.tasks._family import device_of_tasks

__all__ = [
    "Draws",
    "Plan",
    "Stepper",
    "Trainings",
    "clock_of_all",
    "configs_by_step",
    "drawn_at",
    "gathered",
    "idle",
    "inner_step_at",
    "scattered",
    "trainings_of",
    "without_diverged",
]

Tree = Any
Drawn = tuple[int, int, int, int]

_HORIZON, _STAGGER = 3, 5  # further uses of a task's integers, after those of `fmeta.tasks`


class Trainings(NamedTuple):
    """Inner trainings side by side; the copies of a task share its batches.

    Attributes:
        params, hidden: of the models and their optimizers, ``(tasks, copies, ...)``.
        config: of the tasks, ``(tasks, ...)``.
        t: steps made, ``(tasks,)``; a training with ``t >= horizon`` is over.
        horizon: steps to make, ``(tasks,)``.
        drawn: the integers ``(seed, estimate, task, start)`` that fix a task, ``(tasks, 4)``.
    """

    params: Any
    hidden: Any
    config: Any
    t: Tensor
    horizon: Tensor
    drawn: Tensor


class Start(NamedTuple):
    """Trainings that begin at step ``k`` of a truncation; ``places`` says of which tasks."""

    k: int
    places: Tensor
    config: Any
    params: Any
    horizon: Tensor


class Plan(NamedTuple):
    """All that a truncation of K steps needs to know beforehand.

    Attributes:
        starts: in order of ``k``.
        batches, eval_batches: leading dimensions ``(K, tasks)``; ``()`` for none.
        is_new: whether a task's training begins with step k, ``(K, tasks)``.
        t, horizon: of step k, ``(K, tasks)``.
        drawn: the integers of the task at step k, ``(K, tasks, 4)``.
        configs: of each task the trainings in turn, with the number of their steps.
    """

    starts: list[Start]
    batches: Any
    eval_batches: Any
    is_new: Tensor
    t: Tensor
    horizon: Tensor
    drawn: Tensor
    configs: list[list[tuple[int, Any]]]


class Piece(NamedTuple):
    """Steps of one training within a truncation; ``params`` only where it begins with them."""

    is_new: bool
    t: int
    length: int
    horizon: int
    drawn: Drawn
    config: Any
    params: Any
    batches: Any
    eval_batches: Any


class Draws:
    """Draws tasks, batches and horizons, each from integers ``(seed, estimate, task, start)``.

    ``start`` counts the trainings that one estimate begins in the place of a task, from 1; with 0
    the batches of a training that goes on are drawn.

    Args:
        family: where the tasks come from.
        num_tasks: how many run side by side.
        horizon: steps of a training: a number, a choice of numbers of which each training gets
            one, or a schedule (`fmeta.estimators.log_uniform`).
        truncation: steps K of an estimate.
        eval_split: the split of evaluation batches; None: none.
        stagger: whether the first trainings end early, each by a multiple of K of its own, so that
            later ones are not all at the same step.
        together: neighbouring tasks to which one horizon, and one early end, is given.
        first_task: index of the first of them, where other processes have those before it.
    """

    def __init__(
        self,
        family: TaskFamily,
        num_tasks: int,
        horizon: int | Sequence[int] | Horizon,
        truncation: int,
        eval_split: str | None,
        stagger: bool,
        together: int = 1,
        first_task: int = 0,
    ) -> None:
        self.family, self.num_tasks, self.truncation = family, num_tasks, truncation
        self.horizon, self.together = as_horizon(horizon), together
        self.eval_split, self.stagger = eval_split, stagger
        self.indices = range(first_task, first_task + num_tasks)

    def plan(self, seed: int, step: int, now: Trainings, device: torch.device | None) -> Plan:
        """What happens in estimate ``step``, whose trainings begin as ``now``."""
        configs = trees.map(lambda x: x.cpu(), now.config)
        clock = zip(now.t.tolist(), now.horizon.tolist(), now.drawn.tolist(), strict=True)
        starts: dict[int, list[tuple[int, Piece]]] = {}
        batches, evals, ticks, names, seen = [], [], [], [], []
        for i, (t, horizon, drawn) in enumerate(clock):
            config = trees.map(lambda x, i=i: x[i], configs)
            pieces = list(
                self._pieces((seed, step, self.indices[i]), t, horizon, tuple(drawn), config)
            )
            k, times, named = 0, [], []
            for piece in pieces:
                if piece.is_new:
                    starts.setdefault(k, []).append((i, piece))
                for j in range(piece.length):
                    times.append((piece.is_new and j == 0, piece.t + j, piece.horizon))
                    named.append(piece.drawn)
                k += piece.length
            ticks.append(times)
            names.append(named)
            seen.append([(p.length, p.config) for p in pieces])
            batches.append(_concatenated([p.batches for p in pieces]))
            evals.append(_concatenated([p.eval_batches for p in pieces]))
        is_new, when, horizons = torch.tensor(ticks, device=device).permute(2, 1, 0)
        return Plan(
            [_start(k, starts[k], device) for k in sorted(starts)],
            _by_step(stack_tasks(batches, device)),
            _by_step(stack_tasks(evals, device)),
            is_new.bool(),
            when,
            horizons,
            torch.tensor(names, device=device).movedim(1, 0),
            seen,
        )

    def first(self, seed: int, device: torch.device | None) -> Start:
        """The trainings that the first estimate begins."""
        tasks = []
        for i in range(self.num_tasks):
            drawn = (seed, 0, self.indices[i], 1)
            task = sample_task(self.family, 1, *drawn)
            piece = Piece(True, 0, 1, self._horizon(drawn), drawn, *task, ())
            tasks.append((i, piece))
        return _start(0, tasks, device)

    def _pieces(
        self, ints: tuple[int, int, int], t: int, horizon: int, drawn: Any, config: Any
    ) -> Iterator[Piece]:
        """The trainings of one task through a truncation, one after the other."""
        stream, params, start, k = (*ints, 0), None, 0, 0
        while k < self.truncation:
            is_new = t >= horizon
            if is_new:
                start += 1
                stream = drawn = (*ints, start)
                horizon = self._horizon(drawn)
                t = self._first_t(drawn, horizon)
            length = min(horizon - t, self.truncation - k)
            if is_new:
                config, params, batches = sample_task(self.family, length, *drawn)
            else:
                batches = sample_batches(self.family, config, length, *stream)
            evals: Any = ()
            if self.eval_split is not None:
                split = self.eval_split
                evals = sample_batches(self.family, config, length, *stream, split=split)
            yield Piece(is_new, t, length, horizon, drawn, config, params, batches, evals)
            t, k = t + length, k + length

    def _horizon(self, drawn: Drawn) -> int:
        return self.horizon(fold_in(*self._shared(drawn), _HORIZON), drawn[1])

    def _first_t(self, drawn: Drawn, horizon: int) -> int:
        """Where a training is taken to be when it begins: the later, the sooner it ends."""
        if not self.stagger or drawn[1] > 0 or drawn[3] > 1:
            return 0
        pieces = max(1, horizon // self.truncation)
        pick = torch.randint(pieces, (), generator=fold_in(*self._shared(drawn), _STAGGER))
        return int(pick) * self.truncation

    def _shared(self, drawn: Drawn) -> Drawn:
        """The integers of the first of those that are given the same."""
        seed, step, i, start = drawn
        return seed, step, i - i % self.together, start


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


def drawn_at(plan: Plan, bad_step: Tensor) -> Tensor:
    """The integers of each task at step ``bad_step`` of the truncation; -1 is its last step."""
    tasks = torch.arange(len(bad_step), device=bad_step.device)
    return plan.drawn[bad_step, tasks]


def inner_step_at(plan: Plan, bad_step: Tensor) -> Tensor:
    """The inner step of its training at which a task is in step ``bad_step``; -1 stays -1."""
    tasks = torch.arange(len(bad_step), device=bad_step.device)
    return torch.where(bad_step < 0, -1, plan.t[bad_step, tasks])


def configs_by_step(plan: Plan) -> Tree:
    """The config of the task at step k, ``(K, tasks, ...)``."""
    rows = [
        _concatenated([trees.map(lambda x, n=n: x.expand(n, *x.shape), c) for n, c in pieces])
        for pieces in plan.configs
    ]
    return _by_step(stack_tasks(rows, plan.t.device))


def trainings_of(state: Any) -> Trainings:
    """The trainings in an estimator's state, which has fields of the same names."""
    return Trainings(*(getattr(state, name) for name in Trainings._fields))


def clock_of_all(share: Share, plan: Plan) -> Plan:
    """The plan with which step of which training the tasks of all ranks are at.

    Those are ``is_new``, ``t`` and ``drawn``; all else stays that of this rank's tasks.
    """
    if share.ranks.size == 1:
        return plan
    seed = plan.drawn[:1, :1, :1]
    estimate, start = plan.drawn[..., 1].int(), plan.drawn[..., 3].int()
    rows = trees.map(lambda x: x.movedim(1, 0), (plan.is_new, plan.t.int(), estimate, start))
    is_new, t, estimate, start = trees.map(lambda x: x.movedim(0, 1), share.gather(rows))
    task = torch.arange(share.total, device=t.device).expand(t.shape)
    drawn = torch.stack([seed[..., 0].expand(t.shape), estimate, task, start], -1)
    return plan._replace(is_new=is_new, t=t.to(plan.t.dtype), drawn=drawn)


def gathered(share: Share, state: Any) -> Any:
    """An estimator's state with the trainings of all ranks; on rank 0, nothing on the others."""
    found = share.gather(trainings_of(state), to_first=True)
    return state if found is None else state._replace(**found._asdict())


def scattered(share: Share, state: Any) -> Any:
    """This rank's part of what `gathered` gave."""
    return state._replace(**share.part(trainings_of(state))._asdict())


def without_diverged(trainings: Trainings, diverged: Tensor) -> Trainings:
    """The same, but those that diverged are over: the next estimate begins others."""
    return trainings._replace(t=torch.where(diverged, trainings.horizon, trainings.t))


def _start(k: int, begun: list[tuple[int, Piece]], device: torch.device | None) -> Start:
    config, params, horizon = stack_tasks(
        [(p.config, p.params, torch.tensor(p.horizon)) for _, p in begun], device
    )
    return Start(k, torch.tensor([i for i, _ in begun], device=device), config, params, horizon)


def _spread(tree: Tree, dim: int, copies: int) -> Tree:
    return trees.map(lambda x: x.repeat_interleave(copies, dim), tree)


def _by_step(batches: Tree) -> Tree:
    return trees.map(lambda x: x.movedim(1, 0).contiguous(), batches)


def _concatenated(pieces: list[Tree]) -> Tree:
    return pieces[0] if len(pieces) == 1 else trees.map(lambda *xs: torch.cat(xs), *pieces)
