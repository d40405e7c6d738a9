"""Inner trainings in progress, which estimators of pieces keep from one estimate to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.distributed import Share

__all__ = ["Trainings", "gathered", "scattered", "trainings_of", "without_diverged"]


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


def trainings_of(state: Any) -> Trainings:
    """The trainings in an estimator's state, which has fields of the same names."""
    return Trainings(*(getattr(state, name) for name in Trainings._fields))


def without_diverged(trainings: Trainings, diverged: Tensor) -> Trainings:
    """The same, but those that diverged are over: the next estimate begins others."""
    return trainings._replace(t=torch.where(diverged, trainings.horizon, trainings.t))


def gathered(share: Share, state: Any) -> Any:
    """An estimator's state with the trainings of all ranks; on rank 0, nothing on the others."""
    found = share.gather(trainings_of(state), to_first=True)
    return state if found is None else state._replace(**found._asdict())


def scattered(share: Share, state: Any) -> Any:
    """This rank's part of what `gathered` gave."""
    return state._replace(**share.part(trainings_of(state))._asdict())
