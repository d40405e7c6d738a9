"""Schedule-free AdamW: no schedule, but an average of the parameters to evaluate with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import applied_as_is
from fmeta._leaves import per_leaf
from fmeta._lift import lift
from fmeta.optimizer import Hidden, Optimizer
from fmeta.optimizers._common import bias_corrections, count, ema_of_squares, nothing_to_learn
from fmeta.optimizers._moments import check_all, check_betas, full_root, is_off, varies_within_leaf

__all__ = ["schedule_free_adamw"]

Tree = Any


def schedule_free_adamw(
    lr: Any = 2.5e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    warmup_steps: Any = 0,
    r: Any = 0.0,
    weight_lr_power: Any = 2.0,
) -> Optimizer:
    """AdamW without momentum, whose iterates are averaged; gradients are taken near the average.

    Three sequences start at the same point: ``z``, which takes the steps, its average ``x``, and
    ``y = (1 - b1) z + b1 x``, where the gradient g is taken. With ``s_t = min(1, t /
    warmup_steps)``, t from 1, and ``v = b2 v + (1 - b2) g^2``::

        z = z - lr s_t (g / (sqrt(v / (1 - b2^t)) + eps) + weight_decay y)
        x = (1 - c_t) x + c_t z,    c_t = w_t / (w_1 + ... + w_t),    w_t = t^r s_t^weight_lr_power

    The model's parameters are y; ``eval_params`` gives x. Equals ``AdamWScheduleFree`` of the
    authors' package, and ``optax.contrib.schedule_free_adamw`` without a warm-up. Nothing else may
    scale the deltas: x is computed from y and z.

    Args:
        lr, eps, weight_decay: numbers, scalar tensors or trees shaped like the parameters.
        betas: a pair of such, the first above 0: the share of x in y; decay of the second moment.
        warmup_steps: as ``lr``; steps over which the rate rises linearly.
        r: as ``lr``; power of t in the weights of the average.
        weight_lr_power: as ``lr``; power of the rate in these weights.

    Returns:
        An `Optimizer` with empty ``opt_params`` and an ``eval_params``; hidden at each leaf: ``z``,
        ``v`` of the leaf's shape, ``weight`` (the sum of the ``w_t``), ``count`` (int64).

    Raises:
        ValueError: for a negative or NaN number, betas that are no pair below 1, or a first beta
            of 0.

    Example:
        >>> rule = schedule_free_adamw(lr=1.0)
        >>> p = torch.zeros(())
        >>> h = rule.init_hidden({}, p)
        >>> for _ in range(3):
        ...     p, h = rule.step({}, p, torch.ones(()), h)
        >>> h.leaves["z"], rule.eval_params({}, p, h).round(decimals=4)
        (tensor(-3.), tensor(-2.))

    Reference:
        Defazio et al. 2405.15682, algorithm 1.
    """
    check_all(lr=lr, eps=eps, weight_decay=weight_decay)
    check_all(warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power)
    b1, b2 = check_betas(betas)
    if any(is_off(x) for x in trees.leaves(b1)):
        raise ValueError(
            "betas[0] must be above 0, got 0: the average x could not be told from y and z; for "
            "plain steps use adamw with betas[0] = 0"
        )
    full = varies_within_leaf(warmup_steps, r, weight_lr_power)

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {
            "z": p.clone(),
            "v": torch.zeros_like(p),
            "weight": torch.zeros_like(p) if full else p.new_zeros(()),
            "count": count(p),
        }

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
        warmup_steps: Any,
        r: Any,
        weight_lr_power: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps, z = h["count"] + 1, h["z"]
        v = ema_of_squares(h["v"], g, b2)
        c2 = bias_corrections((b2, b2), steps, p.dtype)[0]
        u = g / full_root(v, c2, eps) + weight_decay * p
        t = steps.to(p.dtype)
        warmth = torch.clamp(t / _at_least_one(warmup_steps), max=1.0)
        weight = t**r * warmth**weight_lr_power
        total = h["weight"] + weight
        share, rate = weight / total, lr * warmth
        delta = share * (z - p) - rate * (1 - b1 * (1 - share)) * u
        return delta, {"z": z - rate * u, "v": v, "weight": total, "count": steps}

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        flat, spec = trees.flatten(model_params)
        states = trees.flatten_up_to(spec, hidden.leaves, model_params, "the hidden state")
        shares = per_leaf(b1, model_params, spec, "betas[0]")
        return trees.unflatten(
            spec,
            [
                p if p is None else _average(p, s["z"], b)
                for p, s, b in zip(flat, states, shares, strict=True)
            ],
        )

    rule = lift(
        nothing_to_learn,
        init_hidden,
        update,
        hypers=lambda th: {
            "lr": lr,
            "b1": b1,
            "b2": b2,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
        },
        elementwise=True,
    )
    applied_as_is(rule.update)
    return rule._replace(eval_params=eval_params)


def _at_least_one(steps: Any) -> Any:
    return steps.clamp_min(1.0) if isinstance(steps, Tensor) else max(1.0, steps)


def _average(y: Tensor, z: Tensor, b1: Any) -> Tensor:
    """x of ``y = (1 - b1) z + b1 x``."""
    if isinstance(b1, Tensor):
        b1 = b1.to(z.device, z.dtype)
    return (z + (y.to(z.dtype) - z) / b1).to(y.dtype)
