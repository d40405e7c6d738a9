"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import check_numbers, ema, ema_of_squares, nothing_to_learn, safe_sqrt
from fmeta.optimizers._moments import is_off

__all__ = ["rmsprop"]

Tree = Any


def rmsprop(
    lr: Any = 1e-2,
    alpha: Any = 0.99,
    eps: Any = 1e-8,
    momentum: Any = 0.0,
    centered: bool = False,
    *,
    eps_root: Any = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Gradients over the root of their running mean square.

    ``v = alpha v + (1 - alpha) g^2``; ``u = g / (sqrt(v + eps_root) + eps)``, or with ``centered``
    ``v - a^2`` in place of v for the running mean ``a`` of g; ``m = momentum m + u``; ``p -= lr
    m``, or with ``nesterov`` ``p -= lr (momentum m + u)``. Equals `torch.optim.RMSprop`; and
    ``optax.rmsprop(lr, decay, e)`` is ``rmsprop(lr, decay, eps=0.0, eps_root=e)`` (there decay =
    0.9, e = 1e-8; its momentum comes after the rate, which is the same).

    Args:
        lr, alpha, eps, momentum, eps_root: numbers, scalar tensors or trees shaped like the
            parameters.
        centered: divide by an estimate of the standard deviation.
        nesterov: look one step of the momentum ahead; needs a momentum.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``v``, and ``m``, ``a`` where
        used, of the leaf's shape.

    Raises:
        ValueError: for a negative or NaN number, or ``nesterov`` without momentum.

    Reference:
        Tieleman and Hinton, "Lecture 6.5: rmsprop" (2012); centered: Graves 1308.0850, eq. 38-45.
    """
    check_numbers("lr", lr)
    check_numbers("alpha", alpha, below=1.0)
    check_numbers("eps", eps)
    check_numbers("eps_root", eps_root)
    check_numbers("momentum", momentum, below=1.0)
    plain, rooted = is_off(momentum), not is_off(eps_root)
    if plain and nesterov:
        raise ValueError("nesterov=True needs a momentum above 0")
    names = ("v", *(() if plain else ("m",)), *(("a",) if centered else ()))

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name in names}

    def update(
        th: Tree,
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        lr: Any,
        alpha: Any,
        eps: Any,
        momentum: Any,
        eps_root: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        new = {"v": ema_of_squares(h["v"], g, alpha)}
        second = new["v"]
        if centered:
            new["a"] = ema(h["a"], g, alpha)
            second = second - new["a"] * new["a"]
        if rooted:
            second = second.clamp_min(0.0) + eps_root  # rounding can make a variance negative
        u = g / (safe_sqrt(second) + eps)
        if not plain:
            new["m"] = momentum * h["m"] + u
            u = momentum * new["m"] + u if nesterov else new["m"]
        return -lr * u, {name: new[name] for name in names}  # in one order: no recompilation

    return lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "momentum": momentum,
            "eps_root": eps_root,
        },
        elementwise=True,
    )
