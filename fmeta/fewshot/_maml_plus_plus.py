"""MAML++: rates by layer and step, and at first a meta-loss after every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._gradient_based import gradient_based
from fmeta.fewshot._model import as_model
from fmeta.fewshot._per_step_sgd import per_step_sgd
from fmeta.random import fold_in

__all__ = ["maml_plus_plus"]


def maml_plus_plus(
    network: Any,
    *,
    lr: float = 0.1,
    num_steps: int = 5,
    multi_step: float = 0.5,
    **options: Any,
) -> MetaLearner:
    """MAML with learned rates of each layer and step, and the query losses after all steps.

    The weights of the losses after the earlier steps fall linearly to 0 while ``progress`` goes
    from 0 to ``multi_step``; from then on the last one alone counts, as in MAML. So tell
    `estimator` the ``num_steps`` of meta-training, which is else taken to be over. (Of the paper's
    six changes, normalisation by the statistics of the batch is what `gradient_based` does anyway;
    statistics by step are not kept. First order to begin with is `first_order_maml` beforehand,
    and a cosine for the outer rate is the outer optimizer's.)

    Args:
        network: an ``nn.Module``, or a `Model` such as `conv4`.
        lr: what all rates start from.
        num_steps: inner steps. Adaptation with more goes on with the rates of the last one.
        multi_step: part of meta-training in which earlier steps count; 0: in none.
        **options: of `gradient_based`.

    Returns:
        A `MetaLearner`; ``meta_params["opt_params"]["lr"]`` are ``(num_steps,)`` rates for each
        parameter tensor.

    Raises:
        ValueError: ``multi_step`` outside [0, 1], and what `gradient_based` refuses.

    Reference:
        Antoniou, Edwards, Storkey, "How to train your MAML" (1810.09502), section 4.
    """
    if not 0 <= multi_step <= 1:
        raise ValueError(f"multi_step must be a part in [0, 1], got {multi_step}")

    def weights(progress: float, steps: int) -> Tensor:
        early = max(0.0, 1 - progress / multi_step) / steps if multi_step else 0.0
        each = torch.full((steps,), early, dtype=torch.float64)  # and then as the losses
        each[-1] = 1 - (steps - 1) * early
        return each

    model = as_model(network, options.get("batch_norm", "transductive"))
    adapts = options.get("adapts") or (lambda name: True)
    like = {k: v for k, v in model.init(fold_in(0)).items() if adapts(k)}
    return gradient_based(
        model,
        per_step_sgd(like, num_steps, lr),
        num_steps=num_steps,
        step_weights=weights if multi_step else None,
        **options,
    )
