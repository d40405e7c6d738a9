"""LAMB: Adam with a rate for each tensor, by the norms of the tensor and of its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import bias_corrections, count, ema, ema_of_squares, nothing_to_learn
from fmeta.optimizers._moments import check_all, check_betas, full_root
from fmeta.optimizers._trust_ratio import trust_ratio

__all__ = ["lamb"]

Tree = Any


def lamb(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    eps_root: Any = 0.0,
) -> Optimizer:
    """AdamW whose update of each tensor is as long as the tensor, times the rate.

    ``u = (m / c1) / (sqrt(v / c2 + eps_root) + eps) + weight_decay p`` as in `adam`; ``p -= lr
    (||p|| / ||u||) u``, with norms over the tensor, and 1 in place of a ratio with a norm of 0.
    Equals ``optax.lamb``.

    Args:
        lr, eps, weight_decay, eps_root: numbers, scalar tensors or trees shaped like the
            parameters.
        betas: a pair of such.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m``, ``v`` of the leaf's
        shape, ``count`` (int64).

    Raises:
        ValueError: for a negative or NaN number, or betas that are no pair below 1.

    Reference:
        You et al. 1904.00962, algorithm 2.
    """
    check_all(lr=lr, eps=eps, weight_decay=weight_decay, eps_root=eps_root)
    b1, b2 = check_betas(betas)

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "count": count(p)}

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
        eps_root: Any,
        batch: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps = h["count"] + 1
        m, v = ema(h["m"], g, b1), ema_of_squares(h["v"], g, b2)
        c1, c2 = bias_corrections((b1, b2), steps, p.dtype)
        u = m / c1 / full_root(v, c2, eps, eps_root) + weight_decay * p
        return -lr * trust_ratio(p, u, batch) * u, {"m": m, "v": v, "count": steps}

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
            "eps_root": eps_root,
        },
        batched=True,
    )
