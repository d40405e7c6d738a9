"""A learner and a source of episodes as an `Estimator`, for `fmeta.meta_train.run`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fmeta.distributed import Ranks, Share
from fmeta.estimators import Estimate, Estimator
from fmeta.estimators._contract import check_meta_params, check_sizes
from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._source import Source, draw, likeness

__all__ = ["StreamState", "estimator"]

Tree = Any


class StreamState(NamedTuple):
    """Where the stream of episodes stands.

    Attributes:
        seed: the seed of the run.
        step: the number of estimates made.
    """

    seed: int
    step: int


def estimator(
    learner: MetaLearner,
    source: Source,
    *,
    num_tasks: int,
    num_steps: int | None = None,
    ranks: Ranks | None = None,
) -> Estimator:
    """Estimates on meta-batches that a source gives.

    Args:
        learner: any `MetaLearner`.
        source: of episodes.
        num_tasks: episodes in a meta-batch.
        num_steps: outer steps of the whole of meta-training, for learners that look at
            ``progress``; None: they see 1.0.
        ranks: who share the episodes (`fmeta.distributed.joined`); default this process alone. An
            estimate takes one exchange of gradients, and does not depend on how many there are.

    Returns:
        An `Estimator`. Episode i of estimate k is a function of ``(seed, k, i)``; the estimate is
        made on the device and in the dtype of the meta-parameters. Metrics are those of the
        learner's, and ``"drawn"``.

    Raises:
        ValueError: numbers below 1.
    """
    check_sizes(num_tasks=num_tasks, num_steps=num_steps)
    share = Share(ranks or Ranks.alone(), num_tasks)

    def init(meta_params: Tree, seed: int) -> StreamState:
        check_meta_params(meta_params)
        return StreamState(int(seed), 0)

    def estimate(meta_params: Tree, state: StreamState) -> tuple[Estimate, StreamState]:
        like = likeness(meta_params)
        drawn = [(state.seed, state.step, i) for i in range(num_tasks)]
        episodes = draw(source, [drawn[i] for i in share.worked_on], **like)
        progress = 1.0 if num_steps is None else min(1.0, state.step / num_steps)
        found = learner.estimate(meta_params, episodes, progress, share=share)
        metrics = {**found.metrics, "drawn": torch.tensor(drawn, device=like["device"])}
        return found._replace(metrics=metrics), state._replace(step=state.step + 1)

    return Estimator(init, estimate, share.ranks)
