"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import (
    bias_corrections,
    check_numbers,
    count,
    ema,
    ema_of_squares,
    nothing_to_learn,
    safe_sqrt,
)

__all__ = ["adam", "adamw"]

Tree = Any


def adam(
    lr: Any = 1e-3, betas: tuple[Any, Any] = (0.9, 0.999), eps: Any = 1e-8, eps_root: Any = 0.0
) -> Optimizer:
    """Adam: ``p -= lr * (m / c1) / (sqrt(v / c2 + eps_root) + eps)``.

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``ci = 1 - bi^t``, with a count t of
    its own for each leaf. With ``eps_root = 0`` it equals `torch.optim.Adam`. The derivative of
    the root is taken as 0 where v is 0, so that meta-gradients stay finite.

    Args:
        lr, eps, eps_root: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m``, ``v`` of the leaf's
        shape, ``count`` (int64).

    Raises:
        ValueError: for a negative or NaN number, or betas that are no pair below 1.

    Reference:
        Kingma and Ba 1412.6980, algorithm 1.
    """
    return _adam(lr, betas, eps, eps_root, 0.0)


def adamw(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 1e-2,
) -> Optimizer:
    """Adam with decoupled weight decay: ``p -= lr * weight_decay * p`` beside Adam's update.

    Equals `torch.optim.AdamW`.

    Args:
        lr, eps, weight_decay: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such.

    Returns:
        An `Optimizer`; hidden as in `adam`.

    Raises:
        ValueError: for a negative or NaN number, or betas that are no pair below 1.

    Reference:
        Loshchilov and Hutter 1711.05101, algorithm 2.
    """
    check_numbers("weight_decay", weight_decay)
    return _adam(lr, betas, eps, 0.0, weight_decay)


def _adam(lr: Any, betas: Any, eps: Any, eps_root: Any, weight_decay: Any) -> Optimizer:
    check_numbers("lr", lr)
    check_numbers("eps", eps)
    check_numbers("eps_root", eps_root)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair, got {betas!r}")
    b1, b2 = betas
    check_numbers("betas[0]", b1, below=1.0)
    check_numbers("betas[1]", b2, below=1.0)
    rooted = not (isinstance(eps_root, (int, float)) and eps_root == 0)
    decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0)

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
        weight_decay: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps = h["count"] + 1
        m, v = ema(h["m"], g, b1), ema_of_squares(h["v"], g, b2)
        c1, c2 = bias_corrections((b1, b2), steps, p.dtype)
        root = safe_sqrt(v / c2 + eps_root if rooted else v / c2)
        delta = (-lr / c1) * m / (root + eps)
        if decays:
            delta = delta - lr * weight_decay * p
        return delta, {"m": m, "v": v, "count": steps}

    return lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {
            "lr": lr,
            "b1": b1,
            "b2": b2,
            "eps": eps,
            "eps_root": eps_root,
            "weight_decay": weight_decay,
        },
        elementwise=True,
    )
