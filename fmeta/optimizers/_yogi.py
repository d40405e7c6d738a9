"""Yogi: Adam whose mean square changes by amounts that do not depend on itself."""

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
    nothing_to_learn,
)
from fmeta.optimizers._moments import check_all, check_betas, full_root

__all__ = ["yogi"]

Tree = Any


def yogi(
    lr: Any = 1e-2,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-3,
    eps_root: Any = 0.0,
    initial_accumulator_value: float = 1e-6,
) -> Optimizer:
    """Adam with a second moment that falls slowly.

    ``m = b1 m + (1 - b1) g``; ``v = v - (1 - b2) sign(v - g^2) g^2``; ``p -= lr (m / (1 - b1^t)) /
    (sqrt(v / (1 - b2^t) + eps_root) + eps)``. Both start at ``initial_accumulator_value``. Equals
    ``optax.yogi``.

    Args:
        lr, eps, eps_root: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such.
        initial_accumulator_value: m and v before the first step.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m``, ``v`` of the leaf's
        shape, ``count`` (int64).

    Raises:
        ValueError: for a negative or NaN number, or betas that are no pair below 1.

    Reference:
        Zaheer et al., "Adaptive methods for nonconvex optimization" (2018), algorithm 2.
    """
    check_all(lr=lr, eps=eps, eps_root=eps_root)
    check_number("initial_accumulator_value", initial_accumulator_value)
    b1, b2 = check_betas(betas)

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        first = {k: torch.zeros_like(p) + initial_accumulator_value for k in ("m", "v")}
        return {**first, "count": count(p)}

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
        steps, square = h["count"] + 1, g * g
        m = ema(h["m"], g, b1)
        v = h["v"] - (1 - b2) * torch.sign(h["v"] - square) * square
        c1, c2 = bias_corrections((b1, b2), steps, p.dtype)
        delta = (-lr / c1) * m / full_root(v, c2, eps, eps_root)
        return delta, {"m": m, "v": v, "count": steps}

    return lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {"lr": lr, "b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root},
        elementwise=True,
    )
