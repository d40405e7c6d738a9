"""Reptile: towards where inner training ends."""

from __future__ import annotations

from typing import Any

import torch

from fmeta import trees
from fmeta._unroll import unroll
from fmeta.fewshot._contract import Episode, Examples, MetaLearner
from fmeta.fewshot._gradient_based import Inner, gradient_based
from fmeta.fewshot._meta_batch import Piece, shown
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
        **options: of `gradient_based`, but for those that concern a derivative. With
            ``batch_size`` support and query examples take turns, spread over each other.

    Returns:
        A `MetaLearner`. ``adapt`` takes its steps on the support set alone.

    Raises:
        ValueError: what `gradient_based` refuses, and options of a derivative.

    Reference:
        Nichol, Achiam, Schulman, "On first-order meta-learning algorithms" (1803.02999),
        algorithms 1 and 2.
    """
    refused = {"first_order", "checkpoint", "mixed_mode", "step_weights"} & set(options)
    if refused:
        raise ValueError(
            f"reptile takes no derivative through inner training: leave out {min(refused)}"
        )

    def estimate(inner: Inner) -> Piece:
        def piece(meta_params: Tree, episode: Episode, progress: Any) -> Any:
            with torch.no_grad():
                moving, fixed = inner.parts(meta_params["model_params"])
                run = unroll(
                    inner.optimizer,
                    inner.support_loss,
                    meta_params["opt_params"],
                    moving,
                    inner.batches(*_mixed(episode), num_steps),
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
    return gradient_based(network, rule, num_steps=num_steps, estimate=estimate, **options)


def _mixed(episode: Episode) -> Examples:
    """Support and query examples, spread evenly over each other."""
    (xs, ys), (xq, yq) = episode.support, episode.query
    at = [(torch.arange(len(x), device=x.device) + 0.5) / len(x) for x in (xs, xq)]
    order = torch.cat(at).argsort(stable=True)
    return Examples(torch.cat([xs, xq])[order], torch.cat([ys, yq])[order])
