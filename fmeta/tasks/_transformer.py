"""Small transformers: the rows of an image are its tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.tasks._networks import Network, activation_named, affine, uniform

__all__ = ["transformer"]


def transformer(
    tokens: int, inputs: int, width: int, blocks: int, outputs: int, activation: str
) -> Network:
    """Pre-norm encoder with 4 heads (2 where 4 do not divide the width), mean over the tokens.

    Parameters ``embed.w: (inputs, width)``, ``position: (tokens, width)``, for each block
    ``block0.norm1.gain``, ``block0.qkv.w: (width, 3 * width)``, ``block0.out.w``,
    ``block0.up.w: (width, 4 * width)``, ``block0.down.w``, ..., and ``head.w: (width, outputs)``.
    """
    act = activation_named(activation)
    heads = 4 if width % 4 == 0 else 2

    def init(generator: torch.Generator) -> dict[str, Tensor]:
        params = {"position": 0.02 * torch.randn(tokens, width, generator=generator)}

        def linear(name: str, before: int, after: int) -> None:
            params[f"{name}.w"] = uniform(generator, before, after, fan_in=before)
            params[f"{name}.b"] = torch.zeros(after)

        def norm(name: str) -> None:
            params[f"{name}.gain"], params[f"{name}.shift"] = torch.ones(width), torch.zeros(width)

        linear("embed", inputs, width)
        for i in range(blocks):
            norm(f"block{i}.norm1")
            linear(f"block{i}.qkv", width, 3 * width)
            linear(f"block{i}.out", width, width)
            norm(f"block{i}.norm2")
            linear(f"block{i}.up", width, 4 * width)
            linear(f"block{i}.down", 4 * width, width)
        norm("norm")
        linear("head", width, outputs)
        return params

    def apply(params: dict[str, Tensor], x: Tensor) -> Tensor:
        x = affine(params, "embed", x.reshape(-1, tokens, inputs)) + params["position"]
        for i in range(blocks):
            qkv = affine(params, f"block{i}.qkv", _norm(params, f"block{i}.norm1", x))
            x = x + affine(params, f"block{i}.out", _attend(qkv, heads))
            inner = act(affine(params, f"block{i}.up", _norm(params, f"block{i}.norm2", x)))
            x = x + affine(params, f"block{i}.down", inner)
        return affine(params, "head", _norm(params, "norm", x).mean(1))

    return Network(init, apply)


def _norm(params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * params[f"{name}.gain"] + params[f"{name}.shift"]


def _attend(qkv: Tensor, heads: int) -> Tensor:
    """Attention of ``qkv``: (batch, tokens, 3 * width); torch's own has no second derivative."""
    n, tokens, size = qkv.shape
    size = size // (3 * heads)
    q, k, v = qkv.reshape(n, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
    # Keys before queries: torch's softmax is several times slower over a short last dimension.
    weights = (k @ q.transpose(-2, -1) / math.sqrt(size)).softmax(-2)
    return (weights.transpose(-2, -1) @ v).transpose(1, 2).reshape(n, tokens, heads * size)
