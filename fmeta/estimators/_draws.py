"""Everything random about trainings in pieces: settled on the CPU before a step is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fmeta import trees
from fmeta.estimators._horizons import Horizon, as_horizon
from fmeta.estimators._plan import Clock, Plan, Start, by_step, concatenated
from fmeta.estimators._trainings import Trainings
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily, sample_batches, sample_task, stack_tasks

__all__ = ["Draws"]

Drawn = tuple[int, int, int, int]

_HORIZON, _STAGGER = 3, 5  # further uses of a task's integers, after those of `fmeta.tasks`


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
        if now.t.is_meta:  # without values nothing tells who is where: all begin anew
            configs: Any = now.config
            clock: Any = [(0, 0, (seed, step, i, 0)) for i in self.indices]
        else:
            configs = trees.map(lambda x: x.cpu(), now.config)
            clock = zip(now.t.tolist(), now.horizon.tolist(), now.drawn.tolist(), strict=True)
        starts: dict[int, list[tuple[int, Piece]]] = {}
        batches, evals, ticks, names, seen = [], [], [], [], []
        for i, (t, horizon, drawn) in enumerate(clock):
            config = trees.map(lambda x, i=i: x[i], configs)
            pieces = list(
                self._pieces((seed, step, self.indices[i]), t, horizon, tuple(drawn), config)
            )
            k, when, who = 0, [], []
            for piece in pieces:
                if piece.is_new:
                    starts.setdefault(k, []).append((i, piece))
                for j in range(piece.length):
                    when.append((piece.is_new and j == 0, piece.t + j, piece.horizon))
                    who.append(piece.drawn)
                k += piece.length
            ticks.append(when)
            names.append(who)
            seen.append([(p.length, p.config) for p in pieces])
            batches.append(concatenated([p.batches for p in pieces]))
            evals.append(concatenated([p.eval_batches for p in pieces]))
        times = torch.tensor(ticks).permute(2, 1, 0)
        named = torch.tensor(names).movedim(1, 0)
        is_new, t_of, horizons = times.to(device)
        return Plan(
            [_start(k, starts[k], device) for k in sorted(starts)],
            by_step(stack_tasks(batches, device)),
            by_step(stack_tasks(evals, device)),
            is_new.bool(),
            t_of,
            horizons,
            named.to(device),
            Clock(times[0].bool().tolist(), times[1].tolist(), named.tolist()),
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


def _start(k: int, begun: list[tuple[int, Piece]], device: torch.device | None) -> Start:
    config, params, horizon = stack_tasks(
        [(p.config, p.params, torch.tensor(p.horizon)) for _, p in begun], device
    )
    return Start(k, torch.tensor([i for i, _ in begun], device=device), config, params, horizon)
