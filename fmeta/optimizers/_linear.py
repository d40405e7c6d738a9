"""The article's learned optimizer: a linear function of gradient and parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import check_number

__all__ = ["linear"]

Tree = Any


def linear(lr: float = 1e-2) -> Optimizer:
    """``delta = weight @ [gradient, parameter]``, one weight for all coordinates.

    Untrained it is gradient descent: ``weight = [[-lr, 0]]``.

    Args:
        lr: learning rate of the untrained rule, a positive number.

    Returns:
        An `Optimizer` with ``opt_params = {"weight": (1, 2)}`` and no hidden state. It is the rule
        of ``coordinatewise(nn.Linear(2, 1, bias=False))``, written out.

    Reference:
        Wolf, "From zero to research: an introduction to meta-learning" (2018).
    """
    check_number("lr", lr)

    def init(generator: torch.Generator | None = None) -> Tree:
        return {"weight": torch.tensor([[-lr, 0.0]], dtype=torch.float32)}

    def update(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        by_gradient, by_parameter = th["weight"].reshape(2).unbind(0)
        return by_gradient * g + by_parameter * p, h

    return lift(init, lambda th, p: {}, update, elementwise=True)
