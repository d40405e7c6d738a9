"""The network of `rnn_mlp` that sees coordinates: its features, and what it says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fmeta.optimizers._common import safe_sqrt

__all__ = ["inputs", "log_count", "outputs", "step_features"]

_TIMES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)
_EPS = 1e-5  # of the features' root mean squares
_CHUNK = 2**14  # coordinates at once: features and hidden units stay in cache


def inputs(decays: int) -> int:
    """How many inputs there are beside what the recurrent network tells."""
    return _own(decays) + len(_TIMES) + 3


def step_features(t: Tensor, like: Tensor) -> Tensor:
    """Sines of the number of updates before this one, ``(11,)``, in the dtype of ``like``."""
    t = t.to(like.dtype)
    return torch.stack([torch.sin(t / (time * math.pi)) for time in _TIMES])


def log_count(count: int, like: Tensor) -> Tensor:
    """The number of tensors as a feature, ``(1,)``."""
    return like.new_full((1,), math.log(count) - 1)


def outputs(
    mlp: Mapping[str, Tensor],
    told: Tensor,
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the network says of the coordinates, and of the tensor.

    Args:
        mlp: ``w0``, ``b0``, ... (``x @ w + b``).
        told: ``(11 + 1 + F,)``: `step_features`, `log_count`, what the recurrent network tells.
        p, g: ``(*leaf)``, not empty, g clipped.
        m, v: ``(*leaf, D)``, after this gradient.
        chunk_size: coordinates at once; None for a size that suits the caches on a CPU, the whole
            tensor elsewhere.

    Returns:
        ``(direction, magnitude, said)``: ``(numel,)``, ``(numel,)`` and the mean over the
        coordinates of the other outputs, ``(M,)``.
    """
    count, decays = p.numel(), m.shape[-1]
    size = chunk_size or (_CHUNK if p.device.type == "cpu" else count)
    flat = (p.reshape(count), g.reshape(count), m.reshape(count, -1), v.reshape(count, -1))
    parts = [_features(*part) for part in _chunks(flat, size)] if count <= size else None
    squares = [x.square().sum(0) for x in parts or map(_of, _chunks(flat, size))]
    w, b = _first_layer(mlp, told, p, torch.stack(squares).sum(0) / count, _own(decays))
    last = len(mlp) // 2 - 1
    out_w, out_b = mlp[f"w{last}"], mlp[f"b{last}"]
    rest = out_w.shape[1] - 2
    steps, totals = [], []
    for x in parts or map(_of, _chunks(flat, size)):
        x = torch.relu(torch.addmm(b, x, w))
        for i in range(1, last):
            x = torch.relu(torch.addmm(mlp[f"b{i}"], x, mlp[f"w{i}"]))
        steps.append(torch.addmm(out_b.narrow(0, 0, 2), x, out_w.narrow(1, 0, 2)))
        totals.append(x.sum(0))
    # The mean over the coordinates of a linear layer: of its inputs first.
    mean = torch.stack(totals).sum(0) / count
    said = mean @ out_w.narrow(1, 2, rest) + out_b.narrow(0, 2, rest)
    direction, magnitude = torch.cat(steps).unbind(1)
    return direction, magnitude, said


def _own(decays: int) -> int:
    """Features of a coordinate of its own: g, p, log |p|; m, v, m v^-1/2, v^-1/2 of each decay."""
    return 3 + 4 * decays


def _features(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """``(n, 3 + 4 D)`` of n coordinates, not yet divided by their root mean squares."""
    root = torch.rsqrt(v + 1e-6)
    single = torch.stack([g, p, torch.log(p.abs() + 1e-8)], 1)
    return torch.cat([single, m, v, m * root, root], 1)


def _of(part: tuple[Tensor, ...]) -> Tensor:
    return _features(*part)


def _chunks(flat: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    count = flat[0].shape[0]
    for start in range(0, count, size):
        yield tuple(x.narrow(0, start, min(size, count - start)) for x in flat)


def _first_layer(
    mlp: Mapping[str, Tensor], told: Tensor, p: Tensor, squares: Tensor, own: int
) -> tuple[Tensor, Tensor]:
    """Weights and bias for features that are not normalised, all other inputs in the bias."""
    w0 = mlp["w0"]
    norm = torch.log(safe_sqrt(p.square().sum()) + 1e-8).reshape(1)
    numel = p.new_full((1,), math.log(p.numel()))
    time, rest = told.split((len(_TIMES) + 1, told.shape[0] - len(_TIMES) - 1))
    same = torch.cat([time, norm, numel, rest])
    scale = torch.rsqrt(squares + _EPS).unsqueeze(1)
    bias = mlp["b0"] + same @ w0.narrow(0, own, w0.shape[0] - own)
    return w0.narrow(0, 0, own) * scale, bias
