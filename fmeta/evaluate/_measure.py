"""Training one model and measuring it; many of them side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._unroll import unroll
from fmeta.optimizer import Optimizer
from fmeta.tasks import TaskFamily, loss_of_task, sample_batches, sample_task, stack_tasks

__all__ = [
    "BATCHES_A_POINT",
    "Draws",
    "Measured",
    "draw",
    "groups",
    "log_spaced",
    "measure",
    "over_leading",
]

# Batches that a point of a held-out curve is the mean over: one makes a ragged line.
BATCHES_A_POINT = 4
# The last integer of a draw, so that the batches of the final measurement are new ones.
_FRESH = 3


class Draws(NamedTuple):
    """What a group of seeds starts from and sees, each with a leading dimension for the seed.

    Attributes:
        tasks: a stacked `fmeta.tasks.Task`.
        shown: batches of the held-out split, `BATCHES_A_POINT` for each point of the curve.
        fresh: batches of the held-out split for the final measurement.
    """

    tasks: Any
    shown: Any
    fresh: Any


class Measured(NamedTuple):
    """One training run.

    Attributes:
        train: shape ``(T,)``, training loss before each update.
        held_out: shape ``(K,)``, held-out loss after the updates asked for.
        final: held-out loss at the final parameters, mean over the fresh batches.
        metrics: the family's metrics there, likewise.
    """

    train: Tensor
    held_out: Tensor
    final: Tensor
    metrics: dict[str, Tensor]


def draw(
    family: TaskFamily,
    members: Sequence[int],
    *ints: int,
    seed: int,
    num_steps: int,
    num_points: int,
    num_fresh: int,
    split: str,
    held_out: str,
    device: torch.device | None,
) -> Draws:
    """Draws for the seeds in ``members``; further integers make another stream of tasks."""
    rows = []
    for i in members:
        task = sample_task(family, num_steps, seed, i, *ints, split=split)
        shown, fresh = (
            sample_batches(family, task.config, n, seed, i, *ints, *key, split=held_out)
            for n, key in (
                (num_points * BATCHES_A_POINT, ()),
                (num_fresh, (_FRESH,)),
            )
        )
        rows.append(Draws(task, shown, fresh))
    return stack_tasks(rows, device)


def measure(
    family: TaskFamily,
    optimizer: Optimizer,
    opt_params: Any,
    at: Sequence[int],
    task: Any,
    shown: Any,
    fresh: Any,
) -> Measured:
    """Trains one model and measures it.

    Args:
        family, optimizer, opt_params: what is trained, and by what.
        at: increasing numbers of updates after which the held-out loss is taken, the last one T.
        task, shown, fresh: of one seed, as in `Draws`.
    """
    loss_fn = loss_of_task(family)
    params, hidden = task.model_params, None
    losses, held_out = [], []
    for k, (start, stop) in enumerate(zip((0, *at), at, strict=False)):
        run = unroll(
            optimizer,
            loss_fn,
            opt_params,
            params,
            trees.map(lambda x, i=start, j=stop: x[i:j], task.batches),
            loss_args=(task.config,),
            hidden=hidden,
            num_steps=at[-1],
        )
        params, hidden = run.params, run.hidden
        losses.append(run.losses)
        eval_params = optimizer.eval_params(opt_params, params, hidden)
        some = range(k * BATCHES_A_POINT, (k + 1) * BATCHES_A_POINT)
        values = [loss_fn(eval_params, _item(shown, i), task.config) for i in some]
        held_out.append(torch.stack(values).mean(0))
    final, metrics = _final(family, task.config, eval_params, fresh)
    return Measured(torch.cat(losses), torch.stack(held_out), final, metrics)


def _final(
    family: TaskFamily, config: Any, eval_params: Any, fresh: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and metrics over several batches."""
    losses, rows = [], []
    for k in range(trees.leaves(fresh)[0].shape[0]):
        batch = _item(fresh, k)
        losses.append(family.loss(family.data, config, eval_params, batch))
        if family.metrics is not None:
            rows.append(family.metrics(family.data, config, eval_params, batch))
    metrics = {k: torch.stack([row[k] for row in rows]).mean(0) for k in (rows[0] if rows else ())}
    return torch.stack(losses).mean(0), metrics


def _item(batches: Any, k: int) -> Any:
    return trees.map(lambda x: x[k], batches)


def over_leading(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn`` for each member along the leading dimension of ``args``, by `torch.vmap`.

    A single member is run as it is, for models that `vmap` cannot run.
    """
    if trees.leaves(args)[0].shape[0] > 1:
        return torch.vmap(fn)(*args)
    return trees.map(lambda x: x[None], fn(*_item(args, 0)))


def groups(count: int, size: int | None) -> Iterator[range]:
    """``range(count)`` in pieces of at most ``size``."""
    step = count if size is None else size
    return (range(i, min(i + step, count)) for i in range(0, count, step))


def log_spaced(num_steps: int, points: int) -> list[int]:
    """At most ``points`` different whole numbers from 1 to ``num_steps``, evenly spaced in log."""
    if num_steps <= points:
        return list(range(1, num_steps + 1))
    ratio = math.log(num_steps) / max(1, points - 1)
    return sorted({num_steps, *(round(math.exp(k * ratio)) for k in range(points - 1))})
