"""The small networks of many trainings at a time, a tile in the cache after the other.

Where trainings go side by side (`vmap`), each under its own weights, a layer of all of them is
larger than the caches: what is added to it, its ReLU and the next product each read it from memory
and write it back. As one operation that `vmap` and recordings do not look into, all layers are
worked through a few thousand coordinates at a time, in memory that is used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fmeta._autodiff import is_differentiating
from fmeta._trace import is_compiled

__all__ = ["in_tiles", "undifferentiated", "undifferentiated_now"]

# Numbers that the two largest layers take at a time, which stay in a nearer cache (measured: half
# is slower by a tenth, four times as many by as much).
_IN_CACHE = 2**18

_undifferentiated: ContextVar[bool] = ContextVar("_undifferentiated", default=False)


def undifferentiated_now() -> bool:
    """Whether nothing differentiates or compiles what rules do now: it may be one operation.

    Rules may be steps of a loss, or of a further rule, which takes derivatives of them.
    """
    return not is_compiled() and _undifferentiated.get() and not is_differentiating()


@contextmanager
def undifferentiated(yes: bool) -> Iterator[None]:
    """A context in which rules are told so, within `vmap` and recordings."""
    token = _undifferentiated.set(yes)
    try:
        yield
    finally:
        _undifferentiated.reset(token)


def in_tiles(x: Tensor, weights: Sequence[Tensor], bias: Sequence[Tensor]) -> Tensor:
    """``d exp(e)`` of a network (ReLU) with the outputs d and e, for each coordinate.

    Args:
        x: features, ``(features, n)``.
        weights: of each layer, ``(out, in)``.
        bias: of each layer, ``(out, 1)``, or ``(out, n)``.

    Returns:
        Shape ``(n)``.
    """
    result: Tensor = _network(x[None], [w[None] for w in weights], [b[None] for b in bias])
    return result.squeeze(0)


@torch.library.custom_op(
    "fmeta::networks_in_tiles",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] bias) -> Tensor",
)
def _network(x: Tensor, weights: list[Tensor], bias: list[Tensor]) -> Tensor:
    """Of several members, each tensor with a leading axis of them; it gives ``(members, n)``."""
    members, _, n = x.shape
    out, widths = x.new_empty(members, n), [w.shape[1] for w in weights]
    size = _IN_CACHE // sum(sorted(widths)[-2:]) if x.device.type == "cpu" else out.numel()
    several, size = max(1, size // max(n, 1)), min(n, size)
    scratch = [x.new_empty(several * w * size) for w in widths]
    lists = [[t.split(several) for t in ts] for ts in ((out, x), weights, bias)]
    for (y, z), w, b in zip(*(zip(*ts, strict=True) for ts in lists), strict=True):
        if size == n:
            _run(y, z, w, b, scratch)
            continue
        count = -(-n // size)
        columns = [
            t.split(-(-n // count), -1) if t.shape[-1] == n else [t] * count for t in (y, z, *b)
        ]
        for y1, z1, *b1 in zip(*columns, strict=True):
            _run(y1, z1, w, b1, scratch)
    return out


def _run(
    out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Sequence[Tensor],
    scratch: Sequence[Tensor],
) -> None:
    members, _, n = x.shape
    for i, (w, b, memory) in enumerate(zip(weights, bias, scratch, strict=True)):
        y = memory[: members * w.shape[1] * n].view(members, -1, n)
        x = torch.baddbmm(b, w, x.relu_() if i else x, out=y)
    direction, magnitude = x.unbind(1)
    torch.mul(direction, magnitude.exp_(), out=out)


@_network.register_fake
def _(x: Tensor, weights: list[Tensor], bias: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2])


@_network.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, weights: list[Tensor], bias: list[Tensor]) -> Any:
    def merged(t: Any, dim: Any) -> Any:
        if isinstance(t, list):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(t)
            return [merged(*pair) for pair in zip(t, dims, strict=True)]
        t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1)

    out = _network(*(merged(*pair) for pair in zip((x, weights, bias), in_dims, strict=True)))
    return out.unflatten(0, (info.batch_size, -1)), 0
