"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import check_number, count, nothing_to_learn
from fmeta.optimizers._moments import check_all, full_root, is_off

__all__ = ["adagrad"]

Tree = Any


def adagrad(
    lr: Any = 1e-2,
    lr_decay: Any = 0.0,
    weight_decay: Any = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: Any = 1e-10,
    eps_root: Any = 0.0,
) -> Optimizer:
    """Gradients over the root of the sum of all squares so far.

    ``s = s + g^2``; ``p -= lr / (1 + (t - 1) lr_decay) * g / (sqrt(s + eps_root) + eps)``, with
    t from 1. Equals `torch.optim.Adagrad`; and ``optax.adagrad(lr, a, e)`` is
    ``adagrad(lr, initial_accumulator_value=a, eps=0.0, eps_root=e)`` (there a = 0.1, e = 1e-7).

    Args:
        lr, lr_decay, eps, eps_root: numbers, scalar tensors or trees shaped like the parameters.
        weight_decay: as these; ``weight_decay * p`` is added to the gradient.
        initial_accumulator_value: s before the first step.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``s`` of the leaf's shape and
        ``count`` (int64).

    Raises:
        ValueError: for a negative or NaN number.

    Reference:
        Duchi et al., "Adaptive subgradient methods for online learning and stochastic optimization"
        (2011), figure 1 with diagonal matrices.
    """
    check_all(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps, eps_root=eps_root)
    check_number("initial_accumulator_value", initial_accumulator_value)
    decays, slows = not is_off(weight_decay), not is_off(lr_decay)

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {"s": torch.zeros_like(p) + initial_accumulator_value, "count": count(p)}

    def update(
        th: Tree,
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        lr: Any,
        lr_decay: Any,
        weight_decay: Any,
        eps: Any,
        eps_root: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if decays:
            g = g + weight_decay * p
        s = h["s"] + g * g
        rate = lr / (1 + h["count"].to(p.dtype) * lr_decay) if slows else lr
        delta = -rate * g / full_root(s, 1.0, eps, eps_root)
        return delta, {"s": s, "count": h["count"] + 1}

    return lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "eps": eps,
            "eps_root": eps_root,
        },
        elementwise=True,
    )
