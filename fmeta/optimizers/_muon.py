"""Muon: momentum whose singular values are all set to about one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta._newton_schulz import orthogonalize
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

__all__ = ["muon"]

Tree = Any

_LAYOUTS = ("out_in", "in_out")


def muon(
    lr: Any = 0.02,
    momentum: Any = 0.95,
    nesterov: bool = True,
    weight_decay: Any = 0.0,
    ns_steps: int = 5,
    *,
    layout: str = "out_in",
    adamw_lr: Any = None,
    adamw_betas: tuple[Any, Any] = (0.9, 0.999),
    adamw_eps: Any = 1e-8,
    adamw_weight_decay: Any = 0.0,
) -> Optimizer:
    """Momentum, orthogonalised, for matrices; AdamW for tensors of fewer than two axes.

    ``m = b m + (1 - b) g``; ``p -= lr (scale O + weight_decay p)``, where O is what Newton-Schulz
    iterations make of ``m / (1 - b^t)``, or with ``nesterov`` of ``b m / (1 - b^(t+1)) + (1 - b) g
    / (1 - b^t)``: the same singular vectors with values near 1. ``scale`` is ``sqrt(max(1, fan_out
    / fan_in))``.
    A convolution's kernel ``(out, in, ...)`` is the matrix ``(out, rest)``. Equals
    ``optax.contrib.muon`` on matrices and vectors (with ``layout="in_out"``).

    Args:
        lr, momentum, weight_decay: numbers, scalar tensors or trees shaped like the parameters.
        nesterov: look one step ahead, in both parts.
        ns_steps: Newton-Schulz iterations.
        layout: axes of a matrix: ``"out_in"`` as in `torch.nn.Linear`, ``"in_out"`` for ``x @ w``.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: of the other tensors, as in `adamw`;
            ``adamw_lr=None``: the same as ``lr``. To give AdamW embeddings or heads too, use
            `fmeta.combinators.partition`.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``m`` of the leaf's shape and
        ``count`` (int64), with AdamW ``v`` too.

    Raises:
        ValueError: for a negative or NaN number, betas that are no pair below 1, an unknown layout,
            or fewer than one iteration.

    Reference:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    for name, value in (
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("adamw_lr", 0.0 if adamw_lr is None else adamw_lr),
        ("adamw_eps", adamw_eps),
        ("adamw_weight_decay", adamw_weight_decay),
    ):
        check_numbers(name, value)
    check_numbers("momentum", momentum, below=1.0)
    if not isinstance(adamw_betas, (tuple, list)) or len(adamw_betas) != 2:
        raise ValueError(f"adamw_betas must be a pair, got {adamw_betas!r}")
    for i, beta in enumerate(adamw_betas):
        check_numbers(f"adamw_betas[{i}]", beta, below=1.0)
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or ns_steps < 1:
        raise ValueError(f"ns_steps must be at least 1, got {ns_steps!r}")

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        moments = ("m",) if p.ndim > 1 else ("m", "v")
        return {**{k: torch.zeros_like(p) for k in moments}, "count": count(p)}

    def update(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], **hypers: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        part = _matrix if p.ndim > 1 else _vector
        return part(p, g, h, **hypers)

    def _matrix(
        p: Tensor, g: Tensor, h: dict[str, Tensor], lr: Any, b: Any, decay: Any, **others: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps = h["count"] + 1
        m = ema(h["m"], g, b)
        x = _corrected(m, g, b, steps, nesterov).flatten(1)
        out_first = layout == "out_in" or p.ndim > 2
        fan_out, fan_in = x.shape if out_first else (x.shape[1], x.shape[0])
        scale = max(1.0, fan_out / max(1, fan_in)) ** 0.5
        direction = scale * orthogonalize(x, ns_steps).reshape(p.shape)
        return -lr * (direction + decay * p), {"m": m, "count": steps}

    def _vector(
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        adamw_lr: Any,
        b1: Any,
        b2: Any,
        eps: Any,
        adamw_decay: Any,
        **others: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps = h["count"] + 1
        m, v = ema(h["m"], g, b1), ema_of_squares(h["v"], g, b2)
        root = safe_sqrt(v / bias_corrections((b1, b2), steps, p.dtype)[1])
        direction = _corrected(m, g, b1, steps, nesterov) / (root + eps)
        return -adamw_lr * (direction + adamw_decay * p), {"m": m, "v": v, "count": steps}

    return lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {
            "lr": lr,
            "b": momentum,
            "decay": weight_decay,
            "adamw_lr": lr if adamw_lr is None else adamw_lr,
            "b1": adamw_betas[0],
            "b2": adamw_betas[1],
            "eps": adamw_eps,
            "adamw_decay": adamw_weight_decay,
        },
    )


def _corrected(m: Tensor, g: Tensor, beta: Any, steps: Tensor, nesterov: bool) -> Tensor:
    """The average without the pull of its start at 0; with ``nesterov``, that of the next step."""
    now = bias_corrections((beta, beta), steps, m.dtype)[0]
    if not nesterov:
        return m / now
    following = bias_corrections((beta, beta), steps + 1, m.dtype)[0]
    return beta * m / following + (1 - beta) * g / now
