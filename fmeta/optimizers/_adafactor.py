"""Adafactor: second moments of a matrix kept as one number a row and one a column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import check_numbers, count, nothing_to_learn, safe_sqrt
from fmeta.optimizers._features import factored_axes, sum_of_squares
from fmeta.optimizers._moments import check_all, is_off, varies_within_leaf

__all__ = ["adafactor"]

Tree = Any

_AXES = ("largest", "last")


def adafactor(
    lr: Any = 1e-2,
    min_dim_size_to_factor: int = 128,
    decay_rate: Any = 0.8,
    clipping_threshold: Any = 1.0,
    momentum: Any = 0.0,
    weight_decay: Any = 0.0,
    eps: tuple[Any, Any] = (1e-30, 1e-3),
    *,
    multiply_by_parameter_scale: bool = True,
    relative_step: bool = False,
    axes: str = "largest",
) -> Optimizer:
    """Gradients over the root of a factored mean square, at most of size 1, times the tensor's own.

    With weight ``w = t^-decay_rate`` of the newest gradient, t from 1: ``v = (1 - w) v + w (g^2 +
    eps[0])``; for tensors whose two largest axes have at least ``min_dim_size_to_factor`` elements
    only the means of v over each of these axes are kept, ``row`` and ``col``, and ``v = row col /
    mean(row)``. ``u = g / sqrt(v)``; ``u = u / max(1, rms(u) / clipping_threshold)``; ``u = lr
    max(rms(p), eps[1]) u``; with a momentum, u is averaged; ``p -= u + weight_decay p``. Equals
    ``optax.adafactor``.

    `torch.optim.Adafactor` with ``lr``, ``d`` and ``weight_decay`` is ``adafactor(lr, 1,
    clipping_threshold=d, weight_decay=lr * weight_decay, relative_step=True, axes="last")``, for
    gradients whose mean square is well above its own ``eps``, which is a bound there and not added.

    v below the 2/3th power of the smallest number (about 5e-26 in float32) is raised to it, so that
    derivatives stay finite where a gradient is 0: gradients below about 2e-13 make smaller steps
    than optax's. Of equally large axes the last count as the largest, as in a stable sort; optax
    sorts by an algorithm that is not stable on every machine.

    Args:
        lr, decay_rate, momentum, weight_decay: numbers, scalar tensors or trees shaped like the
            parameters. The weight decay is not multiplied by the rate. The Python number 0 as
            momentum keeps no average.
        min_dim_size_to_factor: smaller tensors keep all of v.
        clipping_threshold: as ``lr``, or ``None``: no clipping.
        eps: a pair: added to squares; least size of a tensor.
        multiply_by_parameter_scale: False leaves ``max(rms(p), eps[1])`` out.
        relative_step: take ``min(lr, 1 / sqrt(t))`` as the rate.
        axes: the two axes that are factored: ``"largest"`` or ``"last"``.

    Returns:
        An `Optimizer` with empty ``opt_params``; hidden at each leaf: ``row`` and ``col`` (the
        leaf's shape without one axis each) or ``v`` (the leaf's shape), ``m`` of the leaf's shape
        with a momentum, ``count`` (int64).

    Raises:
        ValueError: for a negative or NaN number, ``eps`` that is no pair, a size below 1, or an
            unknown word for ``axes``.

    Reference:
        Shazeer and Stern 1804.04235, algorithms 4 to 6.
    """
    check_all(lr=lr, decay_rate=decay_rate, weight_decay=weight_decay)
    check_numbers("momentum", momentum, below=1.0)
    if clipping_threshold is not None:
        check_numbers("clipping_threshold", clipping_threshold, positive=True)
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        raise ValueError(f"eps must be a pair, got {eps!r}")
    check_all(**{"eps[0]": eps[0], "eps[1]": eps[1]})
    if varies_within_leaf(decay_rate):
        raise ValueError("decay_rate must be one number a tensor: a row has one weight")
    size = min_dim_size_to_factor
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"min_dim_size_to_factor must be an integer from 1, got {size!r}")
    if axes not in _AXES:
        raise ValueError(f"axes must be one of {', '.join(_AXES)}, got {axes!r}")
    averages = not is_off(momentum)

    def factored(shape: torch.Size) -> tuple[int, int] | None:
        if len(shape) < 2:
            return None
        pair = factored_axes(shape) if axes == "largest" else (len(shape) - 2, len(shape) - 1)
        return pair if min(shape[i] for i in pair) >= size else None

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        pair = factored(p.shape)
        if pair is None:
            state = {"v": torch.zeros_like(p)}
        else:
            state = {k: torch.zeros_like(p.sum(d)) for k, d in _means(pair).items()}
        if averages:
            state["m"] = torch.zeros_like(p)
        return {**state, "count": count(p)}

    def update(
        th: Tree,
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        lr: Any,
        decay_rate: Any,
        momentum: Any,
        weight_decay: Any,
        least_square: Any,
        least_size: Any,
        threshold: Any = None,
        batch: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps = h["count"] + 1
        t = steps.to(p.dtype)
        weight = t ** (-decay_rate)
        own = tuple(range(batch, p.ndim))
        square = g * g + least_square
        pair = factored(p.shape[batch:])
        if pair is None:
            new = {"v": torch.lerp(h["v"], square, weight)}
            u = g * _rsqrt(new["v"])
        else:
            pair = (pair[0] + batch, pair[1] + batch)
            new = {}
            for k, d in _means(pair).items():
                # A count in a stack of leaves has the leaf's axes, of which one is gone here.
                w = weight.squeeze(d) if weight.ndim else weight
                new[k] = torch.lerp(h[k], square.mean(d), w)
            u = g * _factors(new["row"], new["col"], pair)
        if threshold is not None:
            u = u / torch.clamp(_rms(u, own) / threshold, min=1.0)
        rate = torch.minimum(t.rsqrt(), torch.zeros_like(t) + lr) if relative_step else lr
        if multiply_by_parameter_scale:
            rate = rate * torch.clamp(_rms(p, own), min=least_size)
        u = rate * u
        if averages:
            u = new["m"] = torch.lerp(h["m"], u, 1 - momentum)
        return -(u + weight_decay * p), {**new, "count": steps}

    numbers = {
        "lr": lr,
        "decay_rate": decay_rate,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "least_square": eps[0],
        "least_size": eps[1],
    }
    if clipping_threshold is not None:
        numbers["threshold"] = clipping_threshold
    return lift(nothing_to_learn, init_hidden, update, hypers=lambda th: numbers, batched=True)


def _means(pair: tuple[int, int]) -> dict[str, int]:
    """The axis that each of the factors is a mean over."""
    return {"row": pair[1], "col": pair[0]}


def _factors(row: Tensor, col: Tensor, pair: tuple[int, int]) -> Tensor:
    """``1 / sqrt(row col / mean(row))``, of the leaf's shape."""
    d1, d0 = pair
    mean = row.mean(d1 - 1 if d1 > d0 else d1, keepdim=True)
    rows = _rsqrt(row) * _floored(mean).sqrt()
    return rows.unsqueeze(d0) * _rsqrt(col).unsqueeze(d1)


def _rms(x: Tensor, own: tuple[int, ...]) -> Tensor:
    """Root of the mean square over the axes ``own``, which stay as size 1."""
    numel = 1
    for d in own:
        numel *= x.shape[d]
    return safe_sqrt(sum_of_squares(x, own) / max(numel, 1))


def _floor(dtype: torch.dtype) -> float:
    """The least number of which ``x^-1.5``, in the derivative of ``1 / sqrt(x)``, is finite."""
    return torch.finfo(dtype).tiny ** (2 / 3)


def _floored(x: Tensor) -> Tensor:
    floor = _floor(x.dtype)
    return torch.where(x > floor, x, floor)


def _rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(max(x, floor))``; below the floor derivatives of every order are 0."""
    floor = _floor(x.dtype)
    above = x > floor
    return torch.where(above, torch.where(above, x, 1.0).rsqrt(), floor**-0.5)
