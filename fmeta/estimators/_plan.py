"""What happens in a truncation: which trainings begin where, and who is at which step when."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.distributed import Share
from fmeta.tasks import stack_tasks

__all__ = [
    "Clock",
    "Plan",
    "Start",
    "by_step",
    "clock_of_all",
    "concatenated",
    "configs_by_step",
    "drawn_at",
    "inner_step_at",
]

Tree = Any


class Start(NamedTuple):
    """Trainings that begin at step ``k`` of a truncation; ``places`` says of which tasks."""

    k: int
    places: Tensor
    config: Any
    params: Any
    horizon: Tensor


class Clock(NamedTuple):
    """Which step of which training a task is at, in Python: nothing need come from a device.

    Attributes:
        is_new, t, drawn: as in `Plan`.
    """

    is_new: list[list[bool]]
    t: list[list[int]]
    drawn: list[list[list[int]]]


class Plan(NamedTuple):
    """All that a truncation of K steps needs to know beforehand.

    Attributes:
        starts: in order of ``k``.
        batches, eval_batches: leading dimensions ``(K, tasks)``; ``()`` for none.
        is_new: whether a task's training begins with step k, ``(K, tasks)``.
        t, horizon: of step k, ``(K, tasks)``.
        drawn: the integers of the task at step k, ``(K, tasks, 4)``.
        clock: three of these in Python.
        configs: of each task the trainings in turn, with the number of their steps.
    """

    starts: list[Start]
    batches: Any
    eval_batches: Any
    is_new: Tensor
    t: Tensor
    horizon: Tensor
    drawn: Tensor
    clock: Clock
    configs: list[list[tuple[int, Any]]]


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
        concatenated([trees.map(lambda x, n=n: x.expand(n, *x.shape), c) for n, c in pieces])
        for pieces in plan.configs
    ]
    return by_step(stack_tasks(rows, plan.t.device))


def clock_of_all(share: Share, plan: Plan) -> Plan:
    """The plan with which step of which training the tasks of all ranks are at.

    Those are ``is_new``, ``t``, ``drawn`` and ``clock``; all else stays that of this rank's tasks.
    """
    if share.ranks.size == 1:
        return plan
    seed = plan.drawn[:1, :1, :1]
    estimate, start = plan.drawn[..., 1].int(), plan.drawn[..., 3].int()
    rows = trees.map(lambda x: x.movedim(1, 0), (plan.is_new, plan.t.int(), estimate, start))
    is_new, t, estimate, start = trees.map(lambda x: x.movedim(0, 1), share.gather(rows))
    task = torch.arange(share.total, device=t.device).expand(t.shape)
    drawn = torch.stack([seed[..., 0].expand(t.shape), estimate, task, start], -1)
    clock = Clock(is_new.tolist(), t.tolist(), drawn.tolist())
    return plan._replace(is_new=is_new, t=t.to(plan.t.dtype), drawn=drawn, clock=clock)


def by_step(batches: Tree) -> Tree:
    """``(tasks, K, ...)`` as ``(K, tasks, ...)``."""
    return trees.map(lambda x: x.movedim(1, 0).contiguous(), batches)


def concatenated(pieces: list[Tree]) -> Tree:
    """One after the other along the leading dimension."""
    return pieces[0] if len(pieces) == 1 else trees.map(lambda *xs: torch.cat(xs), *pieces)
