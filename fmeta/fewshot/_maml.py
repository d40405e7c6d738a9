"""Model-agnostic meta-learning: initial parameters from which a few gradient steps go far."""

from __future__ import annotations

from typing import Any

from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._gradient_based import gradient_based
from fmeta.fewshot._inner_rule import inner_rule
from fmeta.optimizer import Optimizer

__all__ = ["first_order_maml", "maml"]


def maml(
    network: Any, *, lr: float | None = None, optimizer: Optimizer | None = None, **options: Any
) -> MetaLearner:
    """MAML: the gradient of the query loss through the inner steps, second derivatives included.

    Args:
        network: an ``nn.Module``, or a `Model` such as `conv4`.
        lr: rate of the inner gradient descent; None: 0.1.
        optimizer: another inner rule in its place, which has rates of its own.
        **options: of `gradient_based`: ``num_steps``, ``loss``, ``batch_norm``, ``checkpoint``, ...

    Returns:
        A `MetaLearner`.

    Raises:
        ValueError: both ``lr`` and ``optimizer``, and what `gradient_based` refuses.

    Example:
        >>> import torch, fmeta
        >>> learner = maml(torch.nn.Linear(2, 5))
        >>> meta_params = learner.init()
        >>> support = (torch.randn(5, 2), torch.arange(5))
        >>> adapted = learner.adapt(meta_params, support)
        >>> learner.predict(adapted, torch.randn(3, 2)).shape
        torch.Size([3, 5])

    Reference:
        Finn, Abbeel, Levine: "Model-agnostic meta-learning" (1703.03400), algorithm 1.
    """
    return gradient_based(network, inner_rule(lr, optimizer), **options)


def first_order_maml(
    network: Any, *, lr: float | None = None, optimizer: Optimizer | None = None, **options: Any
) -> MetaLearner:
    """MAML without second derivatives: the gradients that enter the inner steps are constants.

    What the inner optimizer itself learns (rates, say) still has its gradient. Arguments as of
    `maml`.

    Reference:
        Finn, Abbeel, Levine (1703.03400), section 5.2; Nichol et al. (1803.02999) on its gradient.
    """
    return maml(network, lr=lr, optimizer=optimizer, first_order="gradients", **options)
