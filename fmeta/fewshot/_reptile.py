"""Reptile: towards where inner training ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._unroll import unroll
from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._contract import Episode, Examples, MetaLearner
from fmeta.fewshot._gradient_based import Inner, gradient_based
from fmeta.fewshot._meta_batch import Piece, shown
from fmeta.fewshot._model import as_model
from fmeta.optimizer import Optimizer
from fmeta.optimizers import sgd

__all__ = ["reptile"]

Tree = Any


def reptile(
    network: Any,
    *,
    lr: float = 0.1,
    optimizer: Optimizer | None = None,
    num_steps: int = 5,
    batch_size: int | None = None,
    **options: Any,
) -> MetaLearner:
    """Inner training without any derivative through it; the meta-gradient is how far it went.

    ``(start - end) / lr``, of inner training on support and query examples together. With one
    step it is the gradient of the mean loss over all tasks (joint training); with more, the part
    in which different batches of a task agree is favoured.

    Args:
        network: an ``nn.Module``, or a `Model` such as `conv4`.
        lr: rate of the inner gradient descent.
        optimizer: another inner rule in its place, whose own parameters are not learned; the
            meta-gradient is divided by ``lr`` all the same.
        num_steps: inner steps.
        batch_size: examples in an inner step, taken from the episode in turn, support and query
            alternating as far as both last; None: all.
        **options: of `gradient_based`, but for those that concern a derivative.

    Returns:
        A `MetaLearner`. ``adapt`` takes its steps on the whole support set.

    Raises:
        ValueError: numbers below 1, options of a derivative.

    Reference:
        Nichol, Achiam, Schulman, "On first-order meta-learning algorithms" (1803.02999),
        algorithms 1 and 2.
    """
    check_sizes(batch_size=batch_size)
    refused = {"first_order", "checkpoint", "mixed_mode", "step_weights"} & set(options)
    if refused:
        raise ValueError(
            f"reptile takes no derivative through inner training: leave out {min(refused)}"
        )

    def estimate(inner: Inner) -> Piece:
        def piece(meta_params: Tree, episode: Episode, progress: float) -> Any:
            with torch.no_grad():
                moving, fixed = inner.parts(meta_params["model_params"])
                run = unroll(
                    inner.optimizer,
                    inner.support_loss,
                    meta_params["opt_params"],
                    moving,
                    _batches(episode, num_steps, batch_size),
                    loss_args=(fixed,),
                )
                way = {
                    k: (v - run.params[k]) / lr if k in run.params else torch.zeros_like(v)
                    for k, v in meta_params["model_params"].items()
                }
                adapted = inner.adapt(meta_params, episode.support)
                value, outputs = inner.query_loss(adapted, episode.query)
            still = trees.map(torch.zeros_like, meta_params["opt_params"])
            grads = {"model_params": way, "opt_params": still}
            return grads, (value, shown(run.losses, outputs, episode.query.y))

        return piece

    rule = sgd(lr) if optimizer is None else optimizer
    return gradient_based(
        as_model(network), rule, num_steps=num_steps, estimate=estimate, **options
    )


def _batches(episode: Episode, steps: int, size: int | None) -> tuple[Tensor, Tensor]:
    """``(steps, size, ...)`` of all examples in turn."""
    (xs, ys), (xq, yq) = episode
    both = Examples(torch.cat([xs, xq]), torch.cat([ys, yq]))
    if size is None:
        return tuple(t.expand(steps, *t.shape) for t in both)  # type: ignore[return-value]
    order = _alternating(len(xs), len(xq))
    turn = torch.arange(steps * size) % len(order)
    places = order[turn].view(steps, size).to(xs.device)
    return both.x[places], both.y[places]


def _alternating(first: int, second: int) -> Tensor:
    """All indices of two sequences, one behind the other, spread evenly over each other."""
    at = torch.cat([(torch.arange(n) + 0.5) / n for n in (first, second)])
    return at.argsort(stable=True)
