"""A small decoder-only language model as a pure function, for the benchmarks about memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["language_model"]

Params = dict[str, Tensor]


def language_model(
    *,
    vocabulary: int,
    width: int,
    blocks: int,
    length: int,
    generator: torch.Generator,
    wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda block: block,
) -> tuple[Params, Callable[[Params, Tensor], Tensor]]:
    """Parameters and loss of a pre-norm transformer with tied embeddings.

    Args:
        vocabulary, width, blocks, length: sizes; heads are 64 wide (or 16, in a narrow model).
        generator: for the first parameters.
        wrap: what is done to the function of one block (`fmeta.recomputed`, say).

    Returns:
        ``(params, loss_fn)`` with ``loss_fn(params, tokens: (batch, length + 1)) -> scalar``, the
        mean cross entropy of each token after those before it.
    """
    heads = width // (64 if width >= 256 else 16)

    def normal(*shape: int, scale: float = 0.02) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    params = {"embedding": normal(vocabulary, width), "position": normal(length, width)}
    params["norm"] = torch.ones(width)
    deep = 0.02 / math.sqrt(2 * blocks)
    for i in range(blocks):
        params |= {
            f"block{i}.norm1": torch.ones(width),
            f"block{i}.qkv": normal(width, 3 * width),
            f"block{i}.out": normal(width, width, scale=deep),
            f"block{i}.norm2": torch.ones(width),
            f"block{i}.up": normal(width, 4 * width),
            f"block{i}.down": normal(4 * width, width, scale=deep),
        }
    names = ("norm1", "qkv", "out", "norm2", "up", "down")
    later = torch.ones(length, length, dtype=torch.bool).triu(1)

    def attend(qkv: Tensor) -> Tensor:
        # Written out: torch's own attention has no second derivative.
        n, t, _ = qkv.shape
        q, k, v = qkv.reshape(n, t, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // heads)
        hidden = later[:t, :t].to(scores.device)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(n, t, width)

    def block(own: Params, x: Tensor) -> Tensor:
        x = x + attend(norm(x, own["norm1"]) @ own["qkv"]) @ own["out"]
        return x + F.gelu(norm(x, own["norm2"]) @ own["up"]) @ own["down"]

    wrapped = wrap(block)

    def loss_fn(params: Params, tokens: Tensor) -> Tensor:
        before, after = tokens[:, :-1], tokens[:, 1:]
        x = params["embedding"][before] + params["position"][: before.shape[1]]
        for i in range(blocks):
            x = wrapped({name: params[f"block{i}.{name}"] for name in names}, x)
        logits = norm(x, params["norm"]) @ params["embedding"].mT
        return F.cross_entropy(logits.flatten(0, 1), after.flatten())

    return params, loss_fn


def norm(x: Tensor, gain: Tensor) -> Tensor:
    """Division by the root mean square over the last axis, times a gain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain
