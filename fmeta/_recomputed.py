"""`recomputed`: a function whose insides are computed again when they are differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fmeta import _guard
from fmeta._chunks import is_observed
from fmeta._remat import remat

__all__ = ["recomputed"]

_CURE = "as an argument of the recomputed function"


def recomputed(fn: Callable[..., Any], *, check: bool = True) -> Callable[..., Any]:
    """The same function, which keeps only its arguments for the backward pass.

    For a block of a model, say: in an unroll the graph of one step then holds the activations of
    one block at a time (twice the forward pass of the block, for each order of derivative). As
    `torch.utils.checkpoint`, but it composes with `grad`, `vjp`, `jvp`, `vmap`, ``.backward()``,
    the second derivatives of an unroll and its ``checkpoint``, nested in any way.

    Args:
        fn: pure function of trees of tensors, giving a tree of tensors. All that is being
            differentiated or batched must be among its arguments, and it draws no random numbers.
        check: whether each call looks for closed-over traced tensors and random numbers, by one
            more run on stand-ins where anything is recorded. Without it, such a tensor has a
            gradient of zero, silently.

    Returns:
        A function of the same positional arguments, values and derivatives.

    Raises:
        ValueError: when called, for a closed-over traced tensor or random numbers.

    Example:
        >>> import torch
        >>> block = recomputed(lambda w, x: torch.tanh(w * x).square())
        >>> torch.func.grad(block)(torch.tensor(1.0), torch.tensor(0.0))
        tensor(0.)

    Reference:
        Chen et al. 1604.06174.
    """
    again = remat(fn)

    @functools.wraps(fn)
    def wrapped(*args: Any) -> Any:
        if not is_observed():
            return fn(*args)
        if check:
            _guard.refuse_closures_and_noise(fn, *args, cure=_CURE)
        return again(*args)

    return wrapped
