"""Prototypical networks: the class whose mean is nearest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._contract import Episode, MetaLearner, check_examples
from fmeta.fewshot._labels import check_labels
from fmeta.fewshot._losses import loss_named
from fmeta.fewshot._meta_batch import Seen, by_gradient, estimate_by, shown, without_noise
from fmeta.fewshot._model import as_model
from fmeta.fewshot._parts import with_parts
from fmeta.random import fold_in

__all__ = ["Prototypes", "protonet", "prototypes_of"]

Tree = Any


class Prototypes(NamedTuple):
    """A network and the means of the classes in its space.

    Attributes:
        params: of the network.
        means: ``(ways, features)``; infinite of a class without examples, which no query is near.
        stats: what it normalises by; ``()``: by whatever it is shown.
    """

    params: Any
    means: Tensor
    stats: Any


def protonet(
    network: Any,
    ways: int,
    *,
    batch_norm: str = "transductive",
    chunk_size: int | None = None,
) -> MetaLearner:
    """Learns a space in which an input is of the class whose support examples' mean is nearest.

    Logits are the negative squared distances to the means.

    Args:
        network: makes the features: an ``nn.Module``, or a `Model` without a last layer, such as
            ``conv4(ways=None)``.
        ways: classes of an episode.
        batch_norm, chunk_size: as of `gradient_based`.

    Returns:
        A `MetaLearner` with ``meta_params = {"model_params": ...}``; its ``adapt`` takes no steps.

    Raises:
        ValueError: numbers below 1; steps asked for; labels outside of 0 to ``ways`` - 1, and
            classes without a support example, where they can be seen (on the CPU, outside of
            transforms).
        TypeError: no network, or labels that are no integers.

    Reference:
        Snell, Swersky, Zemel, "Prototypical networks for few-shot learning" (1703.05175),
        equations 1 and 2.
    """
    check_sizes(ways=ways, chunk_size=chunk_size)
    model, loss = as_model(network, batch_norm), loss_named("cross_entropy")

    def init(generator: torch.Generator | None = None) -> Tree:
        return {"model_params": model.init(fold_in(0) if generator is None else generator)}

    def adapt(meta_params: Tree, support: Any, *, num_steps: int | None = None) -> Prototypes:
        if num_steps:
            raise ValueError("protonet takes no steps: leave out num_steps")
        x, y = check_examples(support, "the support set")
        check_labels(y, ways, "the support set", every=True)
        params = meta_params["model_params"]
        features, stats = model.apply(params, x)
        return Prototypes(
            params, prototypes_of(features, y, ways), stats if batch_norm == "support" else ()
        )

    def predict(adapted: Prototypes, query_x: Tensor) -> Tensor:
        features, _ = model.apply(adapted.params, query_x, adapted.stats)
        # Infinity minus anything has no derivative: it is put in after the distances.
        gone = adapted.means.isinf().any(-1)
        means = adapted.means.masked_fill(gone[:, None], 0)
        logits = -(features[:, None] - means).square().sum(-1)
        return logits.masked_fill(gone, -torch.inf)

    def meta_loss(meta_params: Tree, episode: Episode, progress: Any) -> tuple[Tensor, Seen]:
        outputs = predict(adapt(meta_params, episode.support), episode.query.x)
        return loss(outputs, episode.query.y), shown(None, outputs, episode.query.y)

    def check(episodes: Episode) -> None:
        check_labels(episodes.support.y, ways, "the support sets", every=True)
        check_labels(episodes.query.y, ways, "the query sets")

    estimate = estimate_by(by_gradient(meta_loss), chunk_size=chunk_size, check=check)
    return with_parts(MetaLearner(init, estimate, without_noise(adapt), without_noise(predict)))


def prototypes_of(features: Tensor, y: Tensor, ways: int) -> Tensor:
    """Means by class, ``(ways, features)``; of a class without examples infinity."""
    member = (y[:, None] == torch.arange(ways, device=y.device)).to(features.dtype)
    count = member.sum(0)[:, None]
    return torch.where(count > 0, (member.T @ features) / count.clamp_min(1), torch.inf)
