"""Stochastic gradient descent, with momentum, Nesterov momentum, or a learned rate a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leaves import per_leaf
from fmeta._lift import lift
from fmeta.optimizer import Optimizer, check_params
from fmeta.optimizers._common import check_numbers, nothing_to_learn

__all__ = ["per_parameter_sgd", "sgd"]

Tree = Any


def sgd(lr: Any = 1e-3, momentum: Any = 0.0, nesterov: bool = False) -> Optimizer:
    """Gradient descent: ``m = momentum * m + g`` (at first ``m = g``), ``p -= lr * m``.

    With ``nesterov``, ``p -= lr * (g + momentum * m)``. Equals `torch.optim.SGD`.

    Args:
        lr: learning rate; a number, a scalar tensor or a tree shaped like the parameters.
        momentum: as ``lr``; the Python number 0 keeps no momentum buffer.
        nesterov: needs a momentum.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m`` of the leaf's shape, or
        nothing.

    Raises:
        ValueError: a negative or NaN number, or ``nesterov`` without momentum.

    Reference:
        Sutskever et al., "On the importance of initialization and momentum" (2013).
    """
    check_numbers("lr", lr)
    check_numbers("momentum", momentum, below=1.0)
    plain = isinstance(momentum, (int, float)) and momentum == 0
    if plain and nesterov:
        raise ValueError("nesterov=True needs a momentum above 0")

    def init_plain(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {}

    def update_plain(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], lr: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -lr * g, h

    def init_momentum(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(p)}

    def update_momentum(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], lr: Any, momentum: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        m = momentum * h["m"] + g
        return -lr * (g + momentum * m if nesterov else m), {"m": m}

    if plain:
        return lift(
            nothing_to_learn,
            init_plain,
            update_plain,
            hypers=lambda th: {"lr": lr},
            elementwise=True,
            stacked=False,
        )
    return lift(
        nothing_to_learn,
        init_momentum,
        update_momentum,
        hypers=lambda th: {"lr": lr, "momentum": momentum},
        elementwise=True,
    )


def per_parameter_sgd(like: Tree, lr: Any = 0.01) -> Optimizer:
    """Meta-SGD: gradient descent with a learned rate for every single parameter.

    ``p -= lr * g`` elementwise, with ``opt_params = {"lr": tree}`` in natural units (a rate may
    become negative).

    Args:
        like: a tree of tensors shaped like the model's parameters.
        lr: start value: a number, or a tree of numbers or tensors shaped like ``like``.

    Returns:
        An `Optimizer` without hidden state.

    Reference:
        Li et al., "Meta-SGD", 1707.09835, equation 2.
    """
    check_numbers("lr", lr)
    check_params(like, allow_none=False)
    flat, spec = trees.flatten(like)
    starts = per_leaf(lr, like, spec, "lr")
    rates = trees.unflatten(spec, [_filled_like(p, x) for p, x in zip(flat, starts, strict=True)])

    def update(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], lr: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -lr * g, h

    return lift(
        lambda generator=None: {"lr": trees.map(torch.clone, rates)},
        lambda th, p: {},
        update,
        hypers=lambda th: {"lr": th["lr"]},
        elementwise=True,
        stacked=False,
    )


def _filled_like(param: Tensor, value: Any) -> Tensor:
    start = torch.zeros_like(param, dtype=trees.compute_dtype(param))
    return start + value
