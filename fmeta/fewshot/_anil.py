"""ANIL: only the last layer adapts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._gradient_based import gradient_based
from fmeta.fewshot._inner_rule import inner_rule
from fmeta.fewshot._model import as_model, check_adapts
from fmeta.optimizer import Optimizer
from fmeta.random import fold_in

__all__ = ["anil"]


def anil(
    network: Any,
    *,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
    head: Callable[[str], bool] | None = None,
    **options: Any,
) -> MetaLearner:
    """Almost no inner loop: MAML whose inner steps change the last layer alone.

    Where the network says which part of it makes the features (`conv4`), they are worked out once
    an episode and not in every step.

    Args:
        network, lr, optimizer: as of `maml`.
        head: ``head(name) -> bool``: which parameters are the last layer's; default: what the
            network says, or those that share the module of the last parameter.
        **options: of `gradient_based`.

    Returns:
        A `MetaLearner`.

    Raises:
        ValueError: a last layer of which all is frozen.

    Reference:
        Raghu et al., "Rapid learning or feature reuse?" (1909.09157), section 4.
    """
    model = as_model(network, options.get("batch_norm", "transductive"))
    rule, adapts = inner_rule(lr, optimizer), head or model.is_head
    check_adapts(adapts, list(model.init(fold_in(0))), network)
    return gradient_based(model, rule, adapts=adapts, **options)
