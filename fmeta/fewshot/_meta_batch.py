"""From the meta-loss of one episode to the estimate of a meta-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._autodiff import grad_and_value
from fmeta.distributed import Share
from fmeta.estimators import Estimate
from fmeta.estimators._averages import first_bad_step, mean_over_tasks
from fmeta.estimators._contract import check_meta_params
from fmeta.fewshot._contract import Episode, check_examples
from fmeta.fewshot._losses import accuracy_of

__all__ = ["Seen", "by_gradient", "estimate_by", "shown"]

Tree = Any
# piece(meta_params, episode, progress) -> (gradient, (value, Seen)): the part of one episode.
Piece = Callable[[Tree, Episode, float], tuple[Tree, tuple[Tensor, "Seen"]]]


class Seen(NamedTuple):
    """What an episode's part in a meta-loss tells beside its value.

    Attributes:
        losses: support losses before each inner step, ``(steps,)``.
        accuracy: on the query set; NaN in regression.
    """

    losses: Tensor
    accuracy: Tensor


def shown(losses: Tensor | None, outputs: Tensor, y: Tensor) -> Seen:
    """`Seen`, of a learner's outputs on the query set; without inner steps ``losses`` is None."""
    if losses is None:
        losses = outputs.new_zeros(0)
    return Seen(losses.detach(), accuracy_of(outputs.detach(), y))


def by_gradient(meta_loss: Callable[..., tuple[Tensor, Seen]]) -> Piece:
    """The exact gradient of ``meta_loss(meta_params, episode, progress) -> (value, Seen)``."""

    def piece(meta_params: Tree, episode: Episode, progress: float) -> Any:
        return grad_and_value(
            lambda params, episode: meta_loss(params, episode, progress), meta_params, episode
        )

    return piece


def estimate_by(piece: Piece, *, chunk_size: int | None = None) -> Callable[..., Estimate]:
    """``estimate`` of a `MetaLearner`: the mean of the episodes' parts, made together by `vmap`.

    Args:
        piece: one episode's part.
        chunk_size: episodes that are worked on together, as in `torch.vmap`; None: all.
    """

    def estimate(
        meta_params: Tree,
        episodes: Episode,
        progress: float = 1.0,
        *,
        share: Share | None = None,
    ) -> Estimate:
        check_meta_params(meta_params)
        episodes = check_episodes(episodes)
        together = torch.vmap(
            lambda params, episode: piece(params, episode, progress),
            in_dims=(None, 0),
            chunk_size=chunk_size,
        )
        with torch.no_grad():  # nothing outside is being differentiated: plain autograd inside
            parts, (values, seen) = together(meta_params, episodes)
            bad = torch.full(values.shape, -1, device=values.device)
            if seen.losses.shape[1]:
                bad = first_bad_step(seen.losses.T.unsqueeze(-1))
            metrics = {"losses": seen.losses, "accuracy": seen.accuracy}
            return mean_over_tasks(values, parts, bad, metrics, share=share)

    return estimate


def check_episodes(episodes: Any) -> Episode:
    """A meta-batch, or an error that says what is wrong with it."""
    if not isinstance(episodes, tuple) or len(episodes) not in (2, 3):
        raise TypeError(
            "episodes must be an Episode(support, query) of stacked tasks, got a "
            f"{type(episodes).__name__}"
        )
    support, query = (check_examples(e, f"episodes[{i}]") for i, e in enumerate(episodes[:2]))
    classes = episodes[2] if len(episodes) == 3 else ()
    counts = {len(x) for x in trees.leaves((support, query, classes))}
    if len(counts) > 1:
        raise ValueError(
            f"episodes must be stacked along one leading dimension of tasks, got {sorted(counts)}"
        )
    if support.y.ndim < 2:
        raise ValueError(
            "episodes must have a leading dimension of tasks: one alone is a batch of 1, "
            "fmeta.tasks.stack_tasks([episode])"
        )
    return Episode(support, query, classes)
