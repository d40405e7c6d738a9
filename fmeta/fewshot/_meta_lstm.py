"""The LSTM meta-learner: initial parameters and optimizer learned together."""

from __future__ import annotations

from typing import Any

from fmeta import optimizers
from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._gradient_based import gradient_based

__all__ = ["meta_lstm"]


def meta_lstm(
    network: Any,
    *,
    num_steps: int = 5,
    hidden_size: int = 20,
    forget_bias: float = 5.0,
    input_bias: float = -4.0,
    first_order: bool | str = "inputs",
    **options: Any,
) -> MetaLearner:
    """Learned gates move the parameters; where they start is the gates' learned cell state.

    Args:
        network: an ``nn.Module``, or a `Model` such as `conv4`.
        num_steps: inner steps.
        hidden_size, forget_bias, input_bias: of `fmeta.optimizers.meta_lstm`.
        first_order: as in `fmeta.unroll`. Default, as in the paper: gradients and losses that the
            rule reads are constants, and so are the parameters where it reads them; the path
            through the cell state stays.
        **options: of `gradient_based`.

    Returns:
        A `MetaLearner`.

    Reference:
        Ravi, Larochelle, "Optimization as a model for few-shot learning" (ICLR 2017, rJY0-Kcll),
        algorithm 1 and section 3.
    """
    rule = optimizers.meta_lstm(hidden_size, forget_bias=forget_bias, input_bias=input_bias)
    return gradient_based(network, rule, num_steps=num_steps, first_order=first_order, **options)
