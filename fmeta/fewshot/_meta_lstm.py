"""The LSTM meta-learner: initial parameters and optimizer learned together."""

from __future__ import annotations

from typing import Any

from fmeta import optimizers
from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._gradient_based import gradient_based
from fmeta.optimizer import Optimizer

__all__ = ["meta_lstm"]


def meta_lstm(
    network: Any,
    *,
    num_steps: int = 5,
    hidden_size: int = 20,
    forget_bias: float = 5.0,
    input_bias: float = -4.0,
    first_order: bool | str = True,
    **options: Any,
) -> MetaLearner:
    """Learned gates move the parameters; where they start is the gates' learned cell state.

    Args:
        network: an ``nn.Module``, or a `Model` such as `conv4`.
        num_steps: inner steps.
        hidden_size, forget_bias, input_bias: of `fmeta.optimizers.meta_lstm`.
        first_order: True, as in the paper: gradients and losses that the rule reads are constants,
            the parameters, which are its cell state, are not. False, ``"gradients"`` and
            ``"inputs"`` as in `fmeta.unroll`; the last makes the parameters constants where the
            gates read and forget them, too.
        **options: of `gradient_based`.

    Returns:
        A `MetaLearner`.

    Reference:
        Ravi, Larochelle, "Optimization as a model for few-shot learning" (ICLR 2017, rJY0-Kcll),
        algorithm 1 and section 3.
    """
    rule = optimizers.meta_lstm(hidden_size, forget_bias=forget_bias, input_bias=input_bias)
    if first_order is True:
        rule = _of_constant_losses(rule)
    return gradient_based(network, rule, num_steps=num_steps, first_order=first_order, **options)


def _of_constant_losses(rule: Optimizer) -> Optimizer:
    def update(*args: Any, loss: Any = None, **more: Any) -> Any:
        return rule.update(*args, loss=None if loss is None else loss.detach(), **more)

    return rule._replace(update=update)
