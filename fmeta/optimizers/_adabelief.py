"""AdaBelief: Adam that divides by how far gradients are from their average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import bias_corrections, count, ema, nothing_to_learn
from fmeta.optimizers._moments import check_all, check_betas, full_root

__all__ = ["adabelief"]

Tree = Any


def adabelief(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-16,
    eps_root: Any = 1e-16,
) -> Optimizer:
    """Large steps where the gradient is what its average predicts.

    ``m = b1 m + (1 - b1) g``; ``v = b2 v + (1 - b2) (g - m)^2 + eps_root``; ``p -= lr (m / (1 -
    b1^t)) / (sqrt(v / (1 - b2^t)) + eps)``. Equals ``optax.adabelief``.

    Args:
        lr, eps, eps_root: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m``, ``v`` of the leaf's
        shape, ``count`` (int64).

    Raises:
        ValueError: for a negative or NaN number, or betas that are no pair below 1.

    Reference:
        Zhuang et al. 2010.07468, algorithm 2.
    """
    check_all(lr=lr, eps=eps, eps_root=eps_root)
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
        eps_root: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps = h["count"] + 1
        m = ema(h["m"], g, b1)
        v = ema(h["v"], (g - m).square(), b2) + eps_root
        c1, c2 = bias_corrections((b1, b2), steps, p.dtype)
        delta = (-lr / c1) * m / full_root(v, c2, eps)
        return delta, {"m": m, "v": v, "count": steps}

    return lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {"lr": lr, "b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root},
        elementwise=True,
    )
