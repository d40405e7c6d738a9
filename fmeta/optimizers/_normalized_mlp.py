"""Celo2's rule: a small network over normalised features of each coordinate."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta._newton_schulz import orthogonalize as orthogonalized
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import bias_corrections, check_numbers, count, ema, safe_sqrt
from fmeta.optimizers._features import is_unobserved, start_factored
from fmeta.optimizers._layout import small_matrices_first
from fmeta.optimizers._normalized_mlp_chunks import chunked_direction
from fmeta.optimizers._normalized_mlp_fused import Weights, form_of, fused, start_in
from fmeta.optimizers._normalized_mlp_net import (
    DECAYS,
    MOMENTS,
    axes_of,
    direction,
    normalized_delta,
)
from fmeta.optimizers._normalized_mlp_tiles import Net, tiled
from fmeta.optimizers._normalized_mlp_written import is_written_out, written_out
from fmeta.random import own

__all__ = ["from_celo2", "normalized_mlp"]

Tree = Any

_ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
# Rows of w0 in the order of the features; the last five groups need two axes.
_WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
_SHAPES: dict[str, tuple[int, ...]] = {
    "w0": (30, 8),
    "b0": (8,),
    "w1": (8, 8),
    "b1": (8,),
    "w2": (8, 3),
    "b2": (3,),
}
# Coordinates a tile, where no derivative is recorded: the features of a tile stay in cache.
_TILE = 2**16
# Larger ones (and larger stacks) are compiled; below it, a call is most of the time either way.
_COMPILED = 2**6
_DIRECTION = 7  # the row of m * rsqrt(rms) with decay 0.9


def normalized_mlp(
    lr: Any = 1e-3,
    weight_decay: Any = 0.0,
    orthogonalize: bool = False,
    vectors: str = "adamw",
    vector_lr_mult: Any = 1.0,
    chunk_size: int | None = None,
    compile: bool = False,
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
        compile: whether all but the smallest tensors go through a few loops made by Inductor (C++
            or Triton), several of one shape together, where no derivative is recorded; for matrices
            and for the kernels of convolutions. Each of the two takes one to three minutes, once,
            and is kept on disk by torch (then 20 to 60 seconds a process).

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

    def by_adamw(ndim: int) -> bool:
        return ndim < 2 and vectors == "adamw"

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        if by_adamw(p.ndim):
            return {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "count": count(p)}
        if p.ndim < 2:
            state = {name: torch.zeros_like(p) for name in MOMENTS}
            return {**state, "v": p.new_zeros(*p.shape, len(DECAYS))}
        # In memory as they are worked on.
        form = form_of(tuple(p.shape), 0) if compile else None
        if form is not None:
            return start_in(form, p)
        layout = small_matrices_first(tuple(p.shape))
        like = p if layout is None else layout.empty(p)
        state = {name: torch.zeros_like(like) for name in MOMENTS}
        row, col = start_factored(p, len(DECAYS))
        return {**state, "row": row, "col": col}

    def update(
        weights: _Weights,
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        lr: Any,
        weight_decay: Any,
        vector_lr_mult: Any,
        batch: int = 0,
        own: bool = False,
        chunk: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if by_adamw(p.ndim - batch):
            return _adamw(p, g, h, lr * vector_lr_mult, weight_decay)
        if p.numel() == 0:
            return torch.zeros_like(p), h
        th, axes = weights.th, axes_of(tuple(p.shape), batch)
        numbers = [x for x in (lr, weight_decay) if isinstance(x, Tensor)]
        post = orthogonalized if orthogonalize and axes.factored is not None else None
        if is_written_out(p, batch):
            step, h = written_out(th, p, g, h, axes)
            step = step if post is None else post(step)
            return normalized_delta(step, p, lr, weight_decay, axes), h
        if axes.factored is not None and is_unobserved(p, g, *h.values(), *th.values(), *numbers):
            size = chunk_size or (_TILE if p.device.type == "cpu" else p.numel())
            if compile and p.numel() > min(_COMPILED, size) and not p.is_meta:
                form = form_of(tuple(p.shape), batch)
                if form is not None:
                    given = weights.fused, form, p, g, h, batch
                    return fused(*given, lr, weight_decay, post, own)
            return tiled(weights.net, p, g, h, batch, lr, weight_decay, post, size, own)
        if chunk is None or p.numel() <= chunk:
            step, h = direction(th, p, g, h, axes)
        else:
            step, h = chunked_direction(th, p, g, h, axes, chunk)
        if post is not None:
            step = post(step)
        return normalized_delta(step, p, lr, weight_decay, axes), h

    return lift(
        _init,
        init_hidden,
        update,
        hypers=lambda th: {
            "lr": lr,
            "weight_decay": weight_decay,
            "vector_lr_mult": vector_lr_mult,
        },
        prepare=_Weights,
        batched=True,
        large_stacks=compile,
        owning=True,
        chunks=lambda coordinates: functools.partial(update, chunk=coordinates),
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
    want: dict[str, tuple[int, ...]] = {f"w0.{i}": (width, 8) for i, width in enumerate(_WIDTHS)}
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
    # x = relu(x) - relu(-x): the first two units of each layer carry the Adam-like direction; in
    # the second a bias, which cancels in the output, keeps them off relu's kink at 0.
    th["w0"][:, :2] = 0.0
    th["w0"][_DIRECTION, :2] = torch.tensor([1.0, -1.0])
    th["w1"][:, :2] = torch.eye(8)[:, :2]
    th["b1"][:2] = 1.0
    th["w2"] *= 0.1
    th["w2"][:2, 0] = torch.tensor([1.0, -1.0])
    return th


class _Weights:
    """The weights for all leaves of a step, and what is made of them once where it is needed."""

    def __init__(self, th: Tree) -> None:
        self.th = th

    @functools.cached_property
    def net(self) -> Net:
        return Net(self.th)

    @functools.cached_property
    def fused(self) -> Weights:
        return Weights(self.th)


def _adamw(
    p: Tensor, g: Tensor, h: dict[str, Tensor], lr: Any, weight_decay: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    b1, b2, eps = _ADAM["b1"], _ADAM["b2"], _ADAM["eps"]
    steps = h["count"] + 1
    m, v = ema(h["m"], g, b1), ema(h["v"], g * g, b2)
    c1, c2 = bias_corrections((b1, b2), steps, p.dtype)
    delta = -lr * ((m / c1) / (safe_sqrt(v / c2) + eps) + weight_decay * p)
    return delta, {"m": m, "v": v, "count": steps}
