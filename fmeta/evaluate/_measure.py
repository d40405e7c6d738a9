"""Training one model and measuring it; many of them side by side."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.estimators._advance import Advance, by_steps
from fmeta.optimizer import Optimizer
from fmeta.tasks import TaskFamily, loss_of_task, sample_batches, sample_task, stack_tasks

__all__ = [
    "BATCHES_A_POINT",
    "Draws",
    "Measured",
    "advancing",
    "draw",
    "groups",
    "log_spaced",
    "measure",
    "over_leading",
]

# Batches that a point of a held-out curve is the mean over: one makes a ragged line.
BATCHES_A_POINT = 4
# Steps from which on it pays to record one (about a second) and to replay it.
_MANY = 300
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
    """Training runs side by side.

    Attributes:
        train: shape ``(models, T)``, training loss before each update.
        held_out: shape ``(models, K)``, held-out loss after the updates asked for.
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
    drawn: Draws,
    advance: Advance | None = None,
) -> Measured:
    """Trains models side by side and measures them.

    Args:
        family, optimizer: what is trained, and by what.
        opt_params: of each model, with its leading dimension.
        at: increasing numbers of updates after which the held-out loss is taken, the last one T.
        drawn: for each model.
        advance: of `advancing`, for those who measure with one optimizer many times.

    Returns:
        A `Measured` whose tensors have a leading dimension of models.
    """
    loss_fn = loss_of_task(family)
    advance = advance or advancing(family, optimizer, at[-1])
    config, params = drawn.tasks.config, drawn.tasks.model_params
    batches = trees.map(lambda x: x.movedim(1, 0), drawn.tasks.batches)

    def start(opt_params: Any, params: Any) -> Any:
        return optimizer.init_hidden(opt_params, params, num_steps=at[-1])

    hidden = over_leading(start, opt_params, params)
    losses, held_out = [], []
    for k, (begin, end) in enumerate(zip((0, *at), at, strict=False)):
        some = trees.map(lambda x, i=begin, j=end: x[i:j], batches)
        params, hidden, found, _ = advance(opt_params, params, hidden, config, some, ())
        losses.append(found)
        seen = over_leading(optimizer.eval_params, opt_params, params, hidden)
        places = range(k * BATCHES_A_POINT, (k + 1) * BATCHES_A_POINT)
        values = [over_leading(loss_fn, seen, _item(drawn.shown, i), config) for i in places]
        held_out.append(torch.stack(values).mean(0))
    final, metrics = _final(family, config, seen, drawn.fresh)
    return Measured(torch.cat(losses).mT, torch.stack(held_out, 1), final, metrics)


def advancing(family: TaskFamily, optimizer: Optimizer, num_steps: int) -> Advance:
    """How `measure` makes its steps: recorded where there are enough of them to pay for that."""
    return by_steps(optimizer, family, evaluate=False, trace=num_steps >= _MANY)


def _final(
    family: TaskFamily, config: Any, eval_params: Any, fresh: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and metrics over several batches."""
    loss_fn = loss_of_task(family)
    losses, rows = [], []
    for k in range(trees.leaves(fresh)[0].shape[1]):
        batch = _item(fresh, k)
        losses.append(over_leading(loss_fn, eval_params, batch, config))
        if family.metrics is not None:
            metrics = functools.partial(family.metrics, family.data)
            rows.append(over_leading(metrics, config, eval_params, batch))
    found = {k: torch.stack([row[k] for row in rows]).mean(0) for k in (rows[0] if rows else ())}
    return torch.stack(losses).mean(0), found


def _item(batches: Any, k: int) -> Any:
    return trees.map(lambda x: x[:, k], batches)


def over_leading(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn`` for each member along the leading dimension of ``args``, by `torch.vmap`.

    A single member is run as it is, for models that `vmap` cannot run.
    """
    if trees.leaves(args)[-1].shape[0] > 1:
        return torch.vmap(fn)(*args)
    return trees.map(lambda x: x[None], fn(*trees.map(lambda x: x[0], args)))


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
