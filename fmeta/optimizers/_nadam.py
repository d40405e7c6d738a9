"""NAdam and NAdamW: Adam with Nesterov's momentum."""

from __future__ import annotations

import math
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
)
from fmeta.optimizers._moments import (
    check_all,
    check_betas,
    full_root,
    is_off,
    look_ahead,
    varies_within_leaf,
)

__all__ = ["nadam", "nadamw"]

Tree = Any


def nadam(
    lr: Any = 2e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    momentum_decay: Any = 4e-3,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """Adam that looks one step of its momentum ahead.

    With ``m``, ``v`` as in `adam` and a momentum ``mu_t = b1 (1 - 0.96^(t momentum_decay) / 2)``
    that warms up: ``p -= lr (mu_(t+1) m / (1 - mu_1 ... mu_(t+1)) + (1 - mu_t) g / (1 - mu_1 ...
    mu_t)) / (sqrt(v / (1 - b2^t)) + eps)``. Equals `torch.optim.NAdam`. With
    ``momentum_decay=None``, ``mu_t = b1`` from the start: ``optax.nadam``.

    Args:
        lr, eps: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such.
        weight_decay: as ``lr``; ``weight_decay * p`` is added to the gradient.
        momentum_decay: as ``lr``, or ``None``: no warm-up of the momentum.
        decoupled_weight_decay: instead, ``p -= lr * weight_decay * p`` beside the update.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m``, ``v`` of the leaf's
        shape, ``count`` (int64), and with a warm-up ``product``, of the momenta so far.

    Raises:
        ValueError: for a negative or NaN number, or betas that are no pair below 1.

    Reference:
        Dozat, "Incorporating Nesterov momentum into Adam" (2016), algorithm 2.
    """
    check_all(lr=lr, eps=eps, weight_decay=weight_decay)
    b1, b2 = check_betas(betas)
    warms = momentum_decay is not None
    if warms:
        check_numbers("momentum_decay", momentum_decay)
    full = warms and varies_within_leaf(b1, momentum_decay)
    decays = not is_off(weight_decay)

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        state = {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "count": count(p)}
        if warms:
            state["product"] = torch.ones_like(p) if full else p.new_ones(())
        return state

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
        momentum_decay: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if decays and not decoupled_weight_decay:
            g = g + weight_decay * p
        steps = h["count"] + 1
        m, v = ema(h["m"], g, b1), ema_of_squares(h["v"], g, b2)
        c1, c2 = bias_corrections((b1, b2), steps, p.dtype)
        new = {"m": m, "v": v, "count": steps}
        if warms:
            t = steps.to(p.dtype)
            mu, following = (_warmed(b1, t + i, momentum_decay) for i in (0, 1))
            new["product"] = h["product"] * mu
            mean = following * m / (1 - new["product"] * following)
            mean = mean + (1 - mu) * g / (1 - new["product"])
        else:
            mean = look_ahead(m, g, b1, c1)
        delta = -lr * mean / full_root(v, c2, eps)
        if decays and decoupled_weight_decay:
            delta = delta - lr * weight_decay * p
        return delta, new

    numbers = {"lr": lr, "b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    if warms:
        numbers["momentum_decay"] = momentum_decay
    return lift(nothing_to_learn, init_hidden, update, hypers=lambda th: numbers, elementwise=True)


def nadamw(
    lr: Any = 2e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 1e-2,
    momentum_decay: Any = None,
) -> Optimizer:
    """AdamW with Nesterov's momentum: `nadam` with ``p -= lr * weight_decay * p`` beside it.

    ``p -= lr ((b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) +
    weight_decay p)``. Equals ``optax.nadamw``; with ``momentum_decay=4e-3``,
    `torch.optim.NAdam` with ``decoupled_weight_decay=True``.

    Args:
        lr, eps, weight_decay: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such.
        momentum_decay: of the momentum's warm-up, as in `nadam`; ``None``: no warm-up.

    Returns:
        An `Optimizer`; hidden as in `nadam`.

    Raises:
        ValueError: for a negative or NaN number, or betas that are no pair below 1.

    Reference:
        Dozat, "Incorporating Nesterov momentum into Adam" (2016); Loshchilov and Hutter 1711.05101.
    """
    return nadam(lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay=True)


def _warmed(beta: Any, t: Tensor, momentum_decay: Any) -> Tensor:
    return beta * (1 - 0.5 * torch.exp(t * momentum_decay * math.log(0.96)))
