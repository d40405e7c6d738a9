"""What few-shot learners have to beat: fine-tuning, training from scratch, nearest neighbours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._unroll import unroll
from fmeta.distributed import Share
from fmeta.estimators import Estimate
from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._contract import Episode, MetaLearner, check_examples
from fmeta.fewshot._gradient_based import gradient_based
from fmeta.fewshot._labels import check_labels
from fmeta.fewshot._losses import loss_named
from fmeta.fewshot._meta_batch import (
    Seen,
    by_gradient,
    check_episodes,
    estimate_by,
    shown,
    without_noise,
)
from fmeta.fewshot._model import as_model, beside
from fmeta.fewshot._parts import with_parts
from fmeta.optimizer import Optimizer
from fmeta.optimizers import adam, sgd
from fmeta.random import fold_in
from fmeta.tasks._networks import affine, uniform

__all__ = ["fine_tune", "from_scratch", "nearest_neighbour"]

Tree = Any


def from_scratch(
    network: Any, *, num_steps: int = 20, optimizer: Optimizer | None = None, **options: Any
) -> MetaLearner:
    """A network trained on the support set alone, from random initial parameters.

    Its meta-parameters are those of ``init`` and not to be meta-trained.

    Args:
        network: an ``nn.Module``, or a `Model` such as `conv4`.
        num_steps: steps on the whole support set.
        optimizer: default Adam at 0.01: with the default steps the best of Adam at 0.001, 0.003
            and 0.01 and gradient descent at 0.1 and 0.5 with 10 and 20 steps, on validation
            episodes of `glyphs` with `conv4`.
        **options: of `gradient_based`.
    """
    rule = adam(1e-2) if optimizer is None else optimizer
    return gradient_based(network, rule, num_steps=num_steps, first_order=True, **options)


class Tuned(NamedTuple):
    """A frozen body with a last layer that was fitted to a support set.

    Attributes:
        params: of the body.
        head: ``{"head.w": (features, ways), "head.b": (ways,)}``.
        stats: what the body normalises by; ``()``: by whatever it is shown.
    """

    params: Any
    head: Any
    stats: Any


def fine_tune(
    network: Any,
    ways: int,
    num_classes: int,
    *,
    num_features: int | None = None,
    num_steps: int = 100,
    lr: float = 0.5,
    batch_norm: str = "transductive",
    chunk_size: int | None = None,
) -> MetaLearner:
    """A classifier of all training classes, whose last layer is then fitted to the support set.

    Features are scaled to length 1 times the square root of their number before the last layer,
    in training and afterwards.

    Args:
        network: makes the features: an ``nn.Module``, or a `Model` without a last layer, such as
            ``conv4(ways=None)``.
        ways: classes of an episode.
        num_classes: classes of the training split, which `Episode.classes` count.
        num_features: outputs of the network, where it does not tell (a module).
        num_steps: gradient steps of the new last layer, from zeros.
        lr: their rate.
        batch_norm, chunk_size: as of `gradient_based`.

    Returns:
        A `MetaLearner`; ``estimate`` classifies all examples of its episodes among all training
        classes, and reports the accuracy of that.

    Raises:
        ValueError: numbers below 1; later, episodes without ``classes``, and labels outside of 0 to
            ``ways`` - 1, where they can be seen (on the CPU, outside of transforms).
        TypeError: later, labels that are no integers.

    Reference:
        Chen et al., "A closer look at few-shot classification" (1904.04232), section 3.2,
        "Baseline".
    """
    check_sizes(ways=ways, num_classes=num_classes, num_steps=num_steps, chunk_size=chunk_size)
    model, loss, rule = as_model(network, batch_norm), loss_named("cross_entropy"), sgd(lr)
    known = model.num_features if num_features is None else num_features
    if known is None:
        raise ValueError("fine_tune must know how many features the network makes: num_features=")
    sizes, default = known, num_steps

    def features_of(params: Tree, x: Tensor, stats: Any = ()) -> tuple[Tensor, Any]:
        found, seen = model.apply(params, x, stats)
        size = found.square().mean(-1, keepdim=True)
        return found * (size + 1e-6).rsqrt(), seen

    def init(generator: torch.Generator | None = None) -> Tree:
        generator = fold_in(0) if generator is None else generator
        params = model.init(generator)
        head = {
            "head.w": uniform(generator, sizes, num_classes, fan_in=sizes),
            "head.b": torch.zeros(num_classes),
        }
        return {"model_params": params, "head": beside(params, head)}

    def meta_loss(meta_params: Tree, episode: Episode, progress: Any) -> tuple[Tensor, Seen]:
        x = torch.cat([episode.support.x, episode.query.x])
        y = episode.classes[torch.cat([episode.support.y, episode.query.y])]
        outputs = affine(
            meta_params["head"], "head", features_of(meta_params["model_params"], x)[0]
        )
        return loss(outputs, y), shown(None, outputs, y)

    by_piece = estimate_by(by_gradient(meta_loss), chunk_size=chunk_size)

    def estimate(
        meta_params: Tree, episodes: Any, progress: float = 1.0, *, share: Share | None = None
    ) -> Estimate:
        if not isinstance(check_episodes(episodes).classes, Tensor):
            raise ValueError(
                "fine_tune needs to know which classes an episode has: give Episode(support, "
                "query, classes), as the sources of classes do"
            )
        check_labels(episodes[0][1], ways, "the support sets")
        check_labels(episodes[1][1], ways, "the query sets")
        return by_piece(meta_params, episodes, progress, share=share)

    def head_loss(head: Tree, batch: Any) -> Tensor:
        features, y = batch
        return loss(affine(head, "head", features), y)

    def adapt(meta_params: Tree, support: Any, *, num_steps: int | None = None) -> Tuned:
        support = check_examples(support, "the support set")
        check_labels(support.y, ways, "the support set")
        steps = default if num_steps is None else num_steps
        params = meta_params["model_params"]
        features, stats = features_of(params, support.x)
        zeros = {
            "head.w": features.new_zeros(features.shape[-1], ways),
            "head.b": features.new_zeros(ways),
        }
        head = zeros
        if steps:
            check_sizes(num_steps=steps)
            batches = trees.map(lambda t: t.expand(steps, *t.shape), (features, support.y))
            head = unroll(rule, head_loss, {}, zeros, batches).params
        return Tuned(params, head, stats if batch_norm == "support" else ())

    def predict(adapted: Tuned, query_x: Tensor) -> Tensor:
        features, _ = features_of(adapted.params, query_x, adapted.stats)
        return affine(adapted.head, "head", features)

    learner = MetaLearner(init, estimate, without_noise(adapt), without_noise(predict))
    return with_parts(learner, adapt=["model_params"])


class Memory(NamedTuple):
    """A support set, as it is."""

    x: Tensor
    y: Tensor


def nearest_neighbour(ways: int) -> MetaLearner:
    """The label of the support example that is nearest in the inputs themselves.

    Args:
        ways: classes of an episode.

    Returns:
        A `MetaLearner` with empty ``meta_params``, so that ``estimate`` refuses; the output of a
        class is the negative squared distance to its nearest example.

    Raises:
        ValueError: ``ways`` below 1; steps asked for; labels outside of 0 to ``ways`` - 1, where
            they can be seen (on the CPU, outside of transforms).
        TypeError: labels that are no integers.
    """
    check_sizes(ways=ways)

    def estimate(meta_params: Tree, episodes: Any, progress: float = 1.0, **more: Any) -> Estimate:
        raise ValueError("nearest_neighbour has nothing to learn: evaluate it as it is")

    def adapt(meta_params: Tree, support: Any, *, num_steps: int | None = None) -> Memory:
        if num_steps:
            raise ValueError("nearest_neighbour takes no steps: leave out num_steps")
        memory = Memory(*check_examples(support, "the support set"))
        check_labels(memory.y, ways, "the support set")
        return memory

    def predict(adapted: Memory, query_x: Tensor) -> Tensor:
        known, asked = adapted.x.flatten(1), query_x.flatten(1)
        apart = (asked[:, None] - known).square().sum(-1)
        of_class = adapted.y[:, None] == torch.arange(ways, device=apart.device)
        return -torch.where(of_class.T, apart[:, None], torch.inf).amin(-1)

    return MetaLearner(lambda generator=None: {}, estimate, adapt, predict)
