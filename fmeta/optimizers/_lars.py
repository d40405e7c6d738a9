"""LARS: momentum with a rate for each tensor, by the norms of the tensor and of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import check_numbers, nothing_to_learn
from fmeta.optimizers._moments import check_all
from fmeta.optimizers._trust_ratio import trust_ratio

__all__ = ["lars"]

Tree = Any


def lars(
    lr: Any = 0.1,
    momentum: Any = 0.9,
    weight_decay: Any = 0.0,
    trust_coefficient: Any = 1e-3,
    eps: Any = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Momentum over gradients that are as long as their tensor, times a small number.

    ``u = g + weight_decay p``; ``m = momentum m + lr (trust_coefficient ||p|| / (||u|| + eps)) u``;
    ``p -= m``, or with ``nesterov`` the same sum once more with the new m. Norms are over the
    tensor; 1 in place of the ratio in parentheses where one of them is 0. Equals ``optax.lars``.

    Args:
        lr, momentum, weight_decay, trust_coefficient, eps: numbers, scalar tensors or trees shaped
            like the parameters.
        nesterov: look one step of the momentum ahead.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m`` of the leaf's shape.

    Raises:
        ValueError: for a negative or NaN number, or a momentum that is not below 1.

    Reference:
        You et al. 1708.03888, algorithm 1.
    """
    check_all(lr=lr, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps)
    check_numbers("momentum", momentum, below=1.0)

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(p)}

    def update(
        th: Tree,
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        lr: Any,
        momentum: Any,
        weight_decay: Any,
        trust_coefficient: Any,
        eps: Any,
        batch: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        u = g + weight_decay * p
        u = lr * trust_ratio(p, u, batch, trust_coefficient, eps) * u
        m = momentum * h["m"] + u
        return -(momentum * m + u if nesterov else m), {"m": m}

    return lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        },
        batched=True,
    )
