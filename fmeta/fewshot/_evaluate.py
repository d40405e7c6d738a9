"""How good a learner is on tasks that it has not seen."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._memory import keep_freed_memory
from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._losses import Loss, accuracy_of, loss_named
from fmeta.fewshot._meta_batch import how_many_together, one_by_one, over_episodes
from fmeta.fewshot._source import Source, draw, likeness

__all__ = ["Scores", "evaluate"]

Tree = Any


class Scores(NamedTuple):
    """One value a test episode; episode i is the same one for every learner.

    Attributes:
        losses: on the query sets, ``(episodes,)``.
        accuracies: on the query sets, ``(episodes,)``; NaN in regression.
    """

    losses: Tensor
    accuracies: Tensor

    def accuracy(self) -> tuple[float, float]:
        """Mean accuracy and half the width of its 95 % confidence interval over episodes."""
        return _interval(self.accuracies)

    def loss(self) -> tuple[float, float]:
        """Mean loss and half the width of its 95 % confidence interval over episodes."""
        return _interval(self.losses)


def evaluate(
    learner: MetaLearner,
    meta_params: Tree,
    source: Source,
    *,
    num_episodes: int = 1000,
    seed: int = 0,
    split: str = "test",
    num_steps: int | None = None,
    loss: str | Loss = "cross_entropy",
    batch_size: int = 50,
    num_threads: int = 1,
) -> Scores:
    """Adapts to each of many episodes and scores its predictions; no graph is recorded.

    Args:
        learner: any `MetaLearner`.
        meta_params: of it.
        source: of the episodes.
        num_episodes: how many.
        seed: episode i is a function of seed, i and the split.
        split: of the source.
        num_steps: of ``adapt``, other than in meta-training; None: the learner's own.
        loss: as of `gradient_based`.
        batch_size: episodes drawn together, and worked on together unless the network convolves
            on a CPU; no effect on the result but by rounding.
        num_threads: threads that work on a batch each; no effect on the result.

    Returns:
        `Scores`.

    Raises:
        ValueError: numbers below 1, a split that the source has not, fewer outputs than ways.
    """
    check_sizes(num_episodes=num_episodes, batch_size=batch_size, num_threads=num_threads)
    keep_freed_memory()
    score = loss_named(loss)
    options = {} if num_steps is None else {"num_steps": num_steps}
    like = likeness(meta_params)
    casts = _autocasts()
    # Inner gradients record a graph, for a step: not of what is the same for all steps.
    given, rebuild = trees.tensors(meta_params)
    meta_params = rebuild(x.detach() for x in given)

    def one(support: Any, query: Any) -> tuple[Tensor, Tensor]:
        outputs = learner.predict(learner.adapt(meta_params, support, **options), query.x)
        if loss == "cross_entropy" and outputs.shape[-1] < source.ways:
            raise ValueError(
                f"the learner gives {outputs.shape[-1]} outputs, but episodes of {source.name} "
                f"have {source.ways} ways: make both for the same number of classes"
            )
        return score(outputs, query.y), accuracy_of(outputs, query.y)

    def batch(start: int) -> tuple[Tensor, Tensor]:
        rows = [(seed, i) for i in range(start, min(start + batch_size, num_episodes))]
        # Each thread has modes of its own.
        with torch.no_grad(), contextlib.ExitStack() as modes:
            for cast in casts:
                modes.enter_context(torch.autocast(**cast))
            episodes = draw(source, rows, split=split, **like)
            if how_many_together(meta_params, episodes) > 1:
                values: tuple[Tensor, Tensor] = over_episodes(one)(episodes.support, episodes.query)
                return values
            found = one_by_one(lambda e: one(e.support, e.query), episodes, closely=not start)
            losses, accuracies = map(torch.stack, zip(*found, strict=True))
        return losses, accuracies

    found = _by_threads(batch, range(0, num_episodes, batch_size), num_threads)
    losses, accuracies = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Scores(losses, accuracies)


def _by_threads(fn: Callable[[int], Any], items: Iterable[int], num_threads: int) -> list[Any]:
    """``[fn(x) for x in items]``, in order."""
    if num_threads == 1:
        return [fn(x) for x in items]
    # A new thread would use as many of its own as there are cores: they share those of this one.
    each = max(1, torch.get_num_threads() // num_threads)
    within = functools.partial(torch.set_num_threads, each)
    pool = ThreadPoolExecutor(num_threads, initializer=within)
    try:
        return list(pool.map(fn, items))
    finally:  # after an error or Ctrl-C what has not begun is left out
        pool.shutdown(cancel_futures=True)


def _autocasts() -> list[dict[str, Any]]:
    """Options of the `torch.autocast` that are in force here."""
    kinds = {"cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")}
    return [
        {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in sorted(kinds)
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    ]


def _interval(values: Tensor) -> tuple[float, float]:
    values = values.double()
    half = 1.96 * values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(half)
