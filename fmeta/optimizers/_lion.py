"""Lion: the sign of an average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import ema, nothing_to_learn
from fmeta.optimizers._moments import check_all, check_betas

__all__ = ["lion"]

Tree = Any


def lion(
    lr: Any = 1e-4, betas: tuple[Any, Any] = (0.9, 0.99), weight_decay: Any = 1e-3
) -> Optimizer:
    """Every coordinate moves by the same amount, in the direction of an averaged gradient.

    ``p -= lr (sign(b1 m + (1 - b1) g) + weight_decay p)``, then ``m = b2 m + (1 - b2) g``. Equals
    ``optax.lion``. The sign has derivative 0: meta-gradients reach ``lr`` and ``weight_decay``, not
    the betas.

    Args:
        lr, weight_decay: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such: of the direction, and of the average that is kept.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m`` of the leaf's shape.

    Raises:
        ValueError: for a negative or NaN number, or betas that are no pair below 1.

    Example:
        >>> rule = lion(lr=0.5, weight_decay=0.0)
        >>> p = torch.zeros(3)
        >>> rule.step({}, p, torch.tensor([2.0, -0.1, 0.0]), rule.init_hidden({}, p))[0]
        tensor([-0.5000,  0.5000,  0.0000])

    Reference:
        Chen et al. 2302.06675, algorithm 2.
    """
    check_all(lr=lr, weight_decay=weight_decay)
    b1, b2 = check_betas(betas)

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(p)}

    def update(
        th: Tree,
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        lr: Any,
        b1: Any,
        b2: Any,
        weight_decay: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        direction = torch.sign(ema(h["m"], g, b1))
        return -lr * (direction + weight_decay * p), {"m": ema(h["m"], g, b2)}

    return lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {"lr": lr, "b1": b1, "b2": b2, "weight_decay": weight_decay},
        elementwise=True,
    )
