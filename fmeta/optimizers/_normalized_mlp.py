"""Celo2's rule: a small network over normalised features of each coordinate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import bias_correction, check_numbers, count, safe_sqrt
from fmeta.optimizers._features import (
    clamped_rsqrt,
    ema,
    factored_axes,
    factors,
    normalize,
    stacked_ema,
    start_factored,
    sum_of_squares,
)
from fmeta.optimizers._features import (
    orthogonalize as orthogonalized,
)
from fmeta.random import own

__all__ = ["from_celo2", "normalized_mlp"]

Tree = Any

_DECAYS = (0.9, 0.99, 0.999)  # of the momenta, and of the factored second moments
_RMS_DECAY = 0.95
_ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
# Rows of w0 in the order of the features; the last five groups need two axes.
_WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
_SHAPES = {"w0": (30, 8), "b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
_DIRECTION = 7  # the row of m * rsqrt(rms) with decay 0.9


def normalized_mlp(
    lr: Any = 1e-3,
    weight_decay: Any = 0.0,
    orthogonalize: bool = False,
    vectors: str = "adamw",
    vector_lr_mult: Any = 1.0,
    chunk_size: int | None = None,
) -> Optimizer:
    """Celo2: ``p -= lr * (d / rms(d) + weight_decay * p)``, d a small network of 30 features.

    The network 30-8-8-3 (ReLU) sees each coordinate. Its features are made of the gradient g
    (clamped to +-1000), the parameter p, three momenta m (decays .9, .99, .999), the second moment
    v (.95) and factored ones r, c over rows and columns (.9, .99, .999), with Adafactor's factors
    f_r, f_c of them: ``g; clip(g, +-.1); p; m; v; m v^-1/2; v^-1/2; g f_r f_c; g v^-1/2; r; c;
    r^-1/2; c^-1/2; m f_r f_c``. Every feature is divided by its root mean square over the last two
    axes (the matrix), and so is the direction d, the first output; the others are not used. So the
    rule knows neither the scale of the loss nor the number of steps.

    Untrained it is near Adam: two of the eight units of a layer carry the positive and negative
    part of ``m v^-1/2`` (m of decay .9), the others start at random and enter the output weakly.

    Where no derivative is recorded, a large tensor is worked on in tiles that stay in cache, with
    the same results to rounding.

    Args:
        lr, weight_decay: numbers, scalar tensors or trees shaped like the parameters.
        orthogonalize: whether d is orthogonalised (Newton-Schulz) before the division by its rms;
            of tensors with at least two axes.
        vectors: what updates tensors with fewer than two axes: ``"adamw"`` (betas .9, .95, eps
            1e-8) with ``lr * vector_lr_mult`` and the same weight decay, or ``"rule"``, the
            learned rule on the first 9 groups of features. Embeddings go to AdamW by `partition`.
        vector_lr_mult: factor of the learning rate in ``vectors="adamw"``.
        chunk_size: coordinates a tile, where no derivative is recorded. Default: a size that suits
            the caches on a CPU, the whole tensor elsewhere.

    Returns:
        An `Optimizer` with ``opt_params = {"w0": (30, 8), "b0": (8), "w1": (8, 8), "b1": (8),
        "w2": (8, 3), "b2": (3)}`` (``x @ w + b``), whatever the arguments. Hidden at each leaf:
        ``m0``, ``m1``, ``m2``, ``rms`` ``(*leaf)``; ``row`` and ``col`` ``(*leaf without its
        largest, second largest axis, 3)``; for a tensor with fewer axes ``v`` ``(*leaf, 3)``
        instead of those, or AdamW's ``m``, ``v``, ``count``.

    Raises:
        ValueError: for an unknown ``vectors``, a negative or NaN number, ``chunk_size`` below 1.

    Example:
        >>> rule = normalized_mlp(lr=0.01)
        >>> params = {"w": torch.ones(2, 2)}
        >>> state = rule.init_hidden(rule.init(), params)
        >>> new, state = rule.step(rule.init(), params, params, state)
        >>> bool((new["w"] < params["w"]).all())
        True

    Reference:
        Celo2, 2602.19142.
    """
    check_numbers("lr", lr)
    check_numbers("weight_decay", weight_decay)
    check_numbers("vector_lr_mult", vector_lr_mult)
    if vectors not in ("adamw", "rule"):
        raise ValueError(f"vectors must be 'adamw' or 'rule', got {vectors!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    def by_adamw(p: Tensor) -> bool:
        return p.ndim < 2 and vectors == "adamw"

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        if by_adamw(p):
            return {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "count": count(p)}
        state = {name: torch.zeros_like(p) for name in ("m0", "m1", "m2", "rms")}
        if p.ndim < 2:
            return {**state, "v": p.new_zeros(*p.shape, len(_DECAYS))}
        row, col = start_factored(p, len(_DECAYS))
        return {**state, "row": row, "col": col}

    def update(
        th: Tree,
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        lr: Any,
        weight_decay: Any,
        vector_lr_mult: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if by_adamw(p):
            return _adamw(p, g, h, lr * vector_lr_mult, weight_decay)
        if p.numel() == 0:
            return torch.zeros_like(p), h
        step, h = _direction(th, p, g, h)
        if orthogonalize and p.ndim >= 2:
            step = orthogonalized(step)
        step = normalize(step, _matrix_axes(p))
        return -lr * (step + weight_decay * p), h

    return lift(
        _init,
        init_hidden,
        update,
        hypers=lambda th: {
            "lr": lr,
            "weight_decay": weight_decay,
            "vector_lr_mult": vector_lr_mult,
        },
    )


def from_celo2(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of `normalized_mlp` from those of a Celo2 network.

    Args:
        arrays: tensors or NumPy arrays by name: ``w0.0`` to ``w0.13`` (one for each group of
            features), ``b0``, ``dense_w.0``, ``dense_b.0``, ``dense_w.1``, ``dense_b.1``; a prefix
            such as ``rule/`` must be removed.

    Returns:
        ``opt_params`` in float32.

    Raises:
        ValueError: naming the first array that is missing, superfluous or of a wrong shape.
    """
    want = {f"w0.{i}": (width, 8) for i, width in enumerate(_WIDTHS)}
    rest = {"b0": "b0", "dense_w.0": "w1", "dense_b.0": "b1", "dense_w.1": "w2", "dense_b.1": "b2"}
    want.update({theirs: _SHAPES[ours] for theirs, ours in rest.items()})
    for name in want:
        if name not in arrays:
            raise ValueError(f"the Celo2 array {name} is missing: there must be {', '.join(want)}")
    for name in arrays:
        if name not in want:
            raise ValueError(f"unknown Celo2 array {name}: there must be {', '.join(want)}")
    found = {name: torch.as_tensor(arrays[name]).to(torch.float32) for name in want}
    for name, shape in want.items():
        if found[name].shape != shape:
            raise ValueError(
                f"the Celo2 array {name} has shape {tuple(found[name].shape)}, not {shape}"
            )
    w0 = torch.cat([found[f"w0.{i}"] for i in range(len(_WIDTHS))])
    return {"w0": w0, **{ours: found[theirs].clone() for theirs, ours in rest.items()}}


def _init(generator: torch.Generator | None = None) -> Tree:
    generator = own(generator)
    th = {}
    for name, shape in _SHAPES.items():
        # He's start: variance 2 / inputs; the biases are zero.
        scale = math.sqrt(2 / shape[0]) if len(shape) == 2 else 0.0
        th[name] = scale * torch.randn(shape, generator=generator, dtype=torch.float32)
    # x = relu(x) - relu(-x): the first two units of each layer carry the Adam-like direction; in the
    # second a bias, which cancels in the output, keeps them off relu's kink at 0.
    th["w0"][:, :2] = 0.0
    th["w0"][_DIRECTION, :2] = torch.tensor([1.0, -1.0])
    th["w1"][:, :2] = torch.eye(8)[:, :2]
    th["b1"][:2] = 1.0
    th["w2"] *= 0.1
    th["w2"][:2, 0] = torch.tensor([1.0, -1.0])
    return th


def _adamw(
    p: Tensor, g: Tensor, h: dict[str, Tensor], lr: Any, weight_decay: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    b1, b2, eps = _ADAM["b1"], _ADAM["b2"], _ADAM["eps"]
    steps = h["count"] + 1
    m, v = ema(h["m"], g, b1), ema(h["v"], g * g, b2)
    c1, c2 = bias_correction(b1, steps, p.dtype), bias_correction(b2, steps, p.dtype)
    delta = -lr * ((m / c1) / (safe_sqrt(v / c2) + eps) + weight_decay * p)
    return delta, {"m": m, "v": v, "count": steps}


def _matrix_axes(p: Tensor) -> tuple[int, ...]:
    return (-2, -1)[-p.ndim :] if p.ndim else ()


# -- one tensor --------------------------------------------------------------------------------


def _direction(
    th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's direction for a whole tensor, before normalisation: ``(*leaf)``."""
    g = _clamped(g)
    square = g * g
    m, rms = _moments(g, square, h)
    state = dict(zip(("m0", "m1", "m2", "rms"), (*m, rms), strict=True))
    if p.ndim < 2:
        state["v"] = v = stacked_ema(h["v"], square, _DECAYS)
        second = clamped_rsqrt(v + 1e-9).movedim(-1, 0)
        x = _features(p, g, m, rms, second, None)
        weights, bias = th["w0"][:15].mT, th["b0"].reshape(8, *(1,) * p.ndim)
    else:
        axes = factored_axes(p.shape)
        state["row"] = stacked_ema(h["row"], square.mean(axes[1]) + 1e-30, _DECAYS)
        state["col"] = stacked_ema(h["col"], square.mean(axes[0]) + 1e-30, _DECAYS)
        row_factor, col_factor, bias_row, bias_col = _factored(th, state["row"], state["col"], axes)
        x = _features(p, g, m, rms, row_factor, col_factor)
        weights, bias = _main_rows(th["w0"]), bias_row + bias_col
    scale = _scale(sum_of_squares(x, _matrix_axes(p)), p)
    return _network(th, weights, bias, x, scale), state


def _clamped(g: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.clamp(g, -1000.0, 1000.0, out=out)


def _moments(
    g: Tensor, square: Tensor, h: dict[str, Tensor], outs: tuple[Tensor | None, ...] = (None,) * 4
) -> tuple[list[Tensor], Tensor]:
    m = [ema(h[f"m{i}"], g, decay, out=outs[i]) for i, decay in enumerate(_DECAYS)]
    return m, ema(h["rms"], square, _RMS_DECAY, out=outs[3])


def _features(
    p: Tensor,
    g: Tensor,
    m: Sequence[Tensor],
    rms: Tensor,
    row_factor: Tensor,
    col_factor: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The features that differ from coordinate to coordinate, feature first.

    Args:
        p, g, rms: ``(*shape)``, with g clamped.
        m: three of ``(*shape)``.
        row_factor, col_factor: ``(3, *)``, to be broadcast over the shape; without ``col_factor``
            the first is the factor of a tensor that is not factored.
        out: ``(18, *shape)``.

    Returns:
        ``(18, *shape)``, or ``(15, *shape)`` without ``col_factor``: the rows of `_main_rows`.
    """
    momenta = torch.stack(list(m))
    root = torch.rsqrt(rms + 1e-8)
    factor = row_factor if col_factor is None else row_factor * col_factor
    rows = [
        torch.stack([g, torch.clamp(g, -0.1, 0.1), p]),
        momenta,
        rms.unsqueeze(0),
        momenta * root,
        root.unsqueeze(0),
        factor * g,
        (g * root).unsqueeze(0),
    ]
    return torch.cat(rows if col_factor is None else [*rows, momenta * factor])


def _main_rows(w0: Tensor) -> Tensor:
    return torch.cat([w0[:15], w0[27:]]).mT


def _factored(
    th: Tree, row: Tensor, col: Tensor, axes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What depends on the factored second moments alone, each with size 1 on the axis it lacks.

    Features that are constant along an axis are cheap: their part of the first layer is computed
    here once for a row or column.

    Returns:
        ``(row_factor, col_factor)``: ``(3, *)``, ``(row_bias, col_bias)``: ``(8, *)``, the first
        with ``b0`` in it.
    """
    d1, d0 = axes
    w0, shaped, biases = th["w0"], [], []
    for second, axis, rows in ((row, d0, (15, 21)), (col, d1, (18, 24))):
        x = second.movedim(-1, 0).unsqueeze(axis + 1)
        x = normalize(torch.cat([x, torch.rsqrt(x + 1e-8)]), (-2, -1))
        w = torch.cat([w0[i : i + 3] for i in rows])
        biases.append((w.mT @ x.flatten(1)).reshape(8, *x.shape[1:]))
    for factor, axis in zip(factors(row, col, axes), (d0, d1), strict=True):
        shaped.append(factor.movedim(-1, 0).unsqueeze(axis + 1))
    b0 = th["b0"].reshape(8, *(1,) * (row.ndim))
    return shaped[0], shaped[1], biases[0] + b0, biases[1]


def _scale(squares: Tensor, p: Tensor) -> Tensor:
    """``1 / rms`` of features from their sums of squares over the matrix axes of ``p``."""
    numel = math.prod(p.shape[-2:])
    return torch.rsqrt(squares / numel + 1e-9)


def _network(th: Tree, w: Tensor, bias: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """The first output of the network for features ``x * scale``.

    Args:
        w: ``(8, features)``; its scaled columns serve where the scale is one for all coordinates.
        bias: ``(8, *)``, to be broadcast over the shape.
        x: ``(features, *shape)``.
        scale: ``(features, *)``, to be broadcast over the shape.
    """
    shape = x.shape[1:]
    if scale.numel() == scale.shape[0]:
        w = w * scale.flatten()
    else:
        x = x * scale
    h = torch.addmm(bias.expand(8, *shape).reshape(8, -1), w, x.flatten(1))
    h = torch.addmm(th["b1"].unsqueeze(1), th["w1"].mT, torch.relu(h))
    return (th["w2"][:, 0] @ torch.relu(h) + th["b2"][0]).reshape(shape)
