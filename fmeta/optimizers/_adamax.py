"""Adamax: Adam with the largest gradient in place of the mean square."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import bias_corrections, count, ema, nothing_to_learn
from fmeta.optimizers._moments import check_all, check_betas, is_off

__all__ = ["adamax"]

Tree = Any


def adamax(
    lr: Any = 2e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
) -> Optimizer:
    """An averaged gradient over the largest recent one.

    ``m = b1 m + (1 - b1) g``; ``u = max(b2 u, |g| + eps)``; ``p -= lr / (1 - b1^t) * m / u``.
    Equals `torch.optim.Adamax` and ``optax.adamax``.

    Args:
        lr, eps: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such.
        weight_decay: as ``lr``; ``weight_decay * p`` is added to the gradient.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m``, ``u`` of the leaf's
        shape, ``count`` (int64).

    Raises:
        ValueError: for a negative or NaN number, or betas that are no pair below 1.

    Reference:
        Kingma and Ba 1412.6980, algorithm 2.
    """
    check_all(lr=lr, eps=eps, weight_decay=weight_decay)
    b1, b2 = check_betas(betas)
    decays = not is_off(weight_decay)

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(p), "u": torch.zeros_like(p), "count": count(p)}

    def update(
        th: Tree,
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        lr: Any,
        b1: Any,
        b2: Any,
        eps: Any,
        weight_decay: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if decays:
            g = g + weight_decay * p
        steps = h["count"] + 1
        m, u = ema(h["m"], g, b1), torch.maximum(b2 * h["u"], g.abs() + eps)
        correction = bias_corrections((b1, b1), steps, p.dtype)[0]
        return (-lr / correction) * m / u, {"m": m, "u": u, "count": steps}

    return lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {
            "lr": lr,
            "b1": b1,
            "b2": b2,
            "eps": eps,
            "weight_decay": weight_decay,
        },
        elementwise=True,
    )
