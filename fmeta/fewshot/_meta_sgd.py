"""Meta-SGD: a learned rate for every parameter, beside learned initial parameters."""

from __future__ import annotations

from typing import Any

from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._gradient_based import gradient_based
from fmeta.fewshot._model import as_model
from fmeta.optimizers import per_parameter_sgd
from fmeta.random import fold_in

__all__ = ["meta_sgd"]


def meta_sgd(network: Any, *, lr: float = 0.1, num_steps: int = 1, **options: Any) -> MetaLearner:
    """MAML with a learned vector of rates, one for each parameter; they may become negative.

    Args:
        network: an ``nn.Module``, or a `Model` such as `conv4`.
        lr: what all rates start from.
        num_steps: inner steps; one in the paper.
        **options: of `gradient_based`.

    Returns:
        A `MetaLearner`; ``meta_params["opt_params"]["lr"]`` are the rates.

    Reference:
        Li et al., "Meta-SGD: learning to learn quickly for few-shot learning" (1707.09835),
        algorithm 1.
    """
    model = as_model(network, options.get("batch_norm", "transductive"))
    adapts = options.get("adapts") or (lambda name: True)
    like = {k: v for k, v in model.init(fold_in(0)).items() if adapts(k)}
    return gradient_based(model, per_parameter_sgd(like, lr), num_steps=num_steps, **options)
