"""Gradient descent whose gradients a learned Kronecker product of small matrices transforms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._lift import lift
from fmeta.optimizer import Optimizer, check_params
from fmeta.optimizers._common import check_number

__all__ = ["meta_curvature"]

Tree = Any


def meta_curvature(like: Tree, lr: Any = 0.01, max_size: int = 1024) -> Optimizer:
    """Meta-curvature: ``p -= lr * g x_1 M_1 x_2 M_2 ...``, with learned matrices.

    A leaf of shape ``(d_1, ..., d_k)`` has a matrix ``M_i (d_i, d_i)`` for each axis, which is
    multiplied along it: ``(g x_i M)[.., a, ..] = sum_b M[a, b] g[.., b, ..]``. For a matrix this is
    ``M_1 g M_2^T``; on the flattened gradient it is the Kronecker product of all ``M_i``. A kernel
    ``(out, in, ...)`` has three: for outputs, inputs, and all places of the filter together. A
    vector has one, full (other implementations give it a diagonal); a scalar has one number.

    The matrices start as the identity: untrained it is gradient descent. They may become anything
    (negative, singular, not symmetric).

    Args:
        like: a tree of tensors shaped like the model's parameters.
        lr: start value of the learned rate, in natural units: a number or scalar tensor.
        max_size: an axis longer than this has a diagonal, ``(d_i,)``, in place of a matrix.

    Returns:
        An `Optimizer` without hidden state; ``opt_params``: ``lr`` (scalar) and ``axes``, a tree
        like ``like`` with a tuple of matrices (or diagonals) at each leaf, in its compute dtype.

    Raises:
        ValueError: ``lr`` negative or not finite, ``max_size`` no integer or negative; in
            `update`, parameters of other shapes than those of ``like``.
        TypeError: ``like`` holds something else than floating tensors.

    Example:
        >>> rule = meta_curvature({"w": torch.zeros(3, 2)}, lr=1.0)
        >>> th = rule.init()
        >>> [tuple(m.shape) for m in th["axes"]["w"]]
        [(3, 3), (2, 2)]
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> th = {**th, "axes": {"w": (th["axes"]["w"][0], swap)}}
        >>> g = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
        >>> rule.update(th, g, g, rule.init_hidden(th, g))[0]["w"]
        tensor([[-2., -1.],
                [-4., -3.],
                [-6., -5.]])

    Reference:
        Park and Oliva, "Meta-Curvature", 1902.03356, section 3.
    """
    check_number("lr", lr)
    if isinstance(lr, Tensor) and lr.ndim:
        raise ValueError(f"lr must be a scalar, got a tensor of shape {tuple(lr.shape)}")
    if isinstance(max_size, bool) or not isinstance(max_size, int) or max_size < 0:
        raise ValueError(f"max_size must be an integer of at least 0, got {max_size!r}")
    check_params(like, allow_none=False)
    dtype = torch.float32
    for p in trees.leaves(like):
        dtype = torch.promote_types(dtype, p.dtype)
    device = trees.common_device(like)
    rate = torch.as_tensor(lr, dtype=None if isinstance(lr, Tensor) else dtype, device=device)

    def init(generator: torch.Generator | None = None) -> Tree:
        axes = trees.map(lambda p: tuple(_identity(n, p, max_size) for n in _sizes(p)), like)
        return {"lr": rate.clone(), "axes": axes}

    def update(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], axes: tuple[Tensor, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sizes = _sizes(p)
        if tuple(m.shape[-1] for m in axes) != sizes:
            raise ValueError(
                f"the matrices are for axes of {', '.join(str(m.shape[-1]) for m in axes)}, but a "
                f"parameter has shape {tuple(p.shape)}: build meta_curvature with the tree of "
                "parameters that it is to train"
            )
        x = g.reshape(sizes)
        for i, m in enumerate(axes):
            x = _along(x, m.to(g.dtype), i)
        return -th["lr"] * x.reshape(g.shape), h

    return lift(
        init,
        lambda th, p: {},
        update,
        hypers=lambda th: {"axes": th["axes"]},
        stacked=False,
    )


def _sizes(param: Tensor) -> tuple[int, ...]:
    """The axes that have a matrix: outputs, inputs, and the rest as one."""
    shape = tuple(param.shape) or (1,)
    return shape if len(shape) < 3 else (*shape[:2], math.prod(shape[2:]))


def _identity(size: int, like: Tensor, max_size: int) -> Tensor:
    dtype = trees.compute_dtype(like)
    if size > max_size:
        return torch.ones(size, dtype=dtype, device=like.device)
    return torch.eye(size, dtype=dtype, device=like.device)


def _along(x: Tensor, m: Tensor, axis: int) -> Tensor:
    """The mode product of a tensor with a matrix, or with a diagonal."""
    moved = x.movedim(axis, -1)
    return (moved * m if m.ndim == 1 else moved @ m.mT).movedim(-1, axis)
