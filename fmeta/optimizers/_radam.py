"""RAdam: Adam that divides by the second moment only once it is known well enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import (
    bias_corrections,
    check_number,
    count,
    ema,
    ema_of_squares,
    nothing_to_learn,
)
from fmeta.optimizers._moments import check_all, check_betas, full_root, is_off

__all__ = ["radam"]

Tree = Any


def radam(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    eps_root: Any = 0.0,
    threshold: float = 5.0,
    corrected_eps: bool = False,
) -> Optimizer:
    """Adam with a rectified rate at the start.

    With ``m``, ``v``, ``c1``, ``c2`` as in `adam`, ``rho = 2 / (1 - b2) - 1`` and ``rho_t = rho -
    2 t b2^t / c2``, the number of gradients that v is about an average of: while ``rho_t <=
    threshold``, ``p -= lr m / c1``; then ``p -= lr r (m / c1) / ((sqrt(v) + eps) / sqrt(c2))`` with
    ``r^2 = (rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t)``. Equals
    `torch.optim.RAdam`; with ``corrected_eps=True``, ``optax.radam``. In float32 the first
    rectified steps have the rounding of ``rho_t`` that they have in optax and in torch's capturable
    form: up to 1 % of these steps, which are short.

    Args:
        lr, eps: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such.
        weight_decay: as ``lr``; ``weight_decay * p`` is added to the gradient.
        decoupled_weight_decay: instead, ``p -= lr * weight_decay * p`` beside the update.
        eps_root: as ``lr``; added to ``v / c2``.
        threshold: at least 4.
        corrected_eps: divide by ``sqrt(v / c2 + eps_root) + eps``, as `adam` does.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m``, ``v`` of the leaf's
        shape, ``count`` (int64).

    Raises:
        ValueError: for a negative or NaN number, betas that are no pair below 1, or a threshold
            below 4.

    Reference:
        Liu et al. 1908.03265, algorithm 2.
    """
    check_all(lr=lr, eps=eps, weight_decay=weight_decay, eps_root=eps_root)
    b1, b2 = check_betas(betas)
    check_number("threshold", threshold)
    if threshold < 4:
        raise ValueError(f"threshold must be at least 4, got {threshold}: r is not real below")
    decays = not is_off(weight_decay)

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if decays and not decoupled_weight_decay:
            g = g + weight_decay * p
        steps = h["count"] + 1
        m, v = ema(h["m"], g, b1), ema_of_squares(h["v"], g, b2)
        c1, c2 = bias_corrections((b1, b2), steps, p.dtype)
        known, rate = _rectification(b2, steps.to(p.dtype), threshold)
        root = full_root(v, c2, eps if corrected_eps else eps / c2.sqrt(), eps_root)
        delta = (-lr / c1) * m * torch.where(known, rate / root, 1.0)
        if decays and decoupled_weight_decay:
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
            "weight_decay": weight_decay,
            "eps_root": eps_root,
        },
        elementwise=True,
    )


def _rectification(b2: Any, t: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Whether ``rho_t > threshold``, and r there (elsewhere a number with finite derivatives)."""
    # In float32 the difference in rho_t loses four digits. Implementations with a count on the
    # device have this same error, and their numbers can only be met with it.
    power = b2**t
    longest = torch.zeros_like(power) + (2 / (1 - b2) - 1)
    length = longest - 2 * t * power / (1 - power)
    known = length > threshold
    n, most = torch.where(known, length, 6.0), torch.where(known, longest, 7.0)
    square = (n - 4) * (n - 2) * most / ((most - 4) * (most - 2) * n)
    return known, square.sqrt()
