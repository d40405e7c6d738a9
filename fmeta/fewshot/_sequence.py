"""Blocks that read a sequence and never look ahead: causal attention, causal convolutions.

What the past gives to a position does not depend on the position. So a block offers two programs
that agree: one for a whole sequence, which also tells what it keeps of it, and one that goes on
from there by a single position, for each of many that come next without seeing each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.tasks._networks import affine, uniform

__all__ = ["Block", "attention", "chain", "dense", "temporal", "to_outputs"]

Params = dict[str, Tensor]


class Block(NamedTuple):
    """One layer of a causal network of sequences.

    Attributes:
        init: ``init(generator) -> params``, a flat dict.
        over: ``over(params, x) -> (y, kept)``, of a whole sequence ``x``: ``(n, in)``; ``y``:
            ``(n, num_outputs)``, row t of the rows 0 to t of ``x`` alone; ``kept`` is what the
            rows hand on to later ones.
        after: ``after(params, kept, x) -> y``: what row n would be after the sequence, for each
            ``x``: ``(m, in)`` by itself; ``y``: ``(m, num_outputs)``.
        num_outputs: numbers in a row of ``y``.
    """

    init: Callable[[torch.Generator], Params]
    over: Callable[[Params, Tensor], tuple[Tensor, Any]]
    after: Callable[[Params, Any, Tensor], Tensor]
    num_outputs: int


def attention(name: str, num_inputs: int, key_size: int, value_size: int) -> Block:
    """Beside each row what it reads from itself and the rows before.

    Keys, queries and values are affine in ``x``; row t reads ``softmax_{s <= t}(q_t . k_s /
    sqrt(key_size)) . v``. Keys and queries start from the same weights, so that a row first looks
    for its like.

    Args:
        name: parameters are ``"{name}.w"`` ``(num_inputs, 2 * key_size + value_size)`` and
            ``"{name}.b"``, of keys, queries and values in this order.
        num_inputs: numbers in a row.
        key_size, value_size: numbers in a key and in a value.

    Reference:
        Mishra et al. (1707.03141), figure 2b and `AttentionBlock`.
    """

    def init(generator: torch.Generator) -> Params:
        keys = uniform(generator, num_inputs, key_size, fan_in=num_inputs)
        values = uniform(generator, num_inputs, value_size, fan_in=num_inputs)
        return {
            f"{name}.w": torch.cat([keys, keys, values], 1),
            f"{name}.b": torch.zeros(2 * key_size + value_size),
        }

    def of(params: Params, x: Tensor) -> tuple[Tensor, ...]:
        keys, queries, values = affine(params, name, x).split([key_size, key_size, value_size], -1)
        return keys, queries / math.sqrt(key_size), values

    def over(params: Params, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        keys, queries, values = of(params, x)
        places = torch.arange(len(x), device=x.device)
        later = places > places[:, None]
        read = (queries @ keys.T).masked_fill(later, -torch.inf).softmax(-1) @ values
        return torch.cat([x, read], -1), (keys, values)

    def after(params: Params, kept: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        keys, queries, values = of(params, x)
        past_keys, past_values = kept
        itself = (queries * keys).sum(-1, keepdim=True)
        weights = torch.cat([queries @ past_keys.T, itself], -1).softmax(-1)
        read = weights[:, :-1] @ past_values + weights[:, -1:] * values
        return torch.cat([x, read], -1)

    return Block(init, over, after, num_inputs + value_size)


def dense(name: str, num_inputs: int, filters: int, dilation: int) -> Block:
    """Beside each row a gated convolution of it and of the row ``dilation`` before it.

    ``tanh(f) * sigmoid(g)``, where f and g are affine in both rows; before the first one are zeros.

    Args:
        name: parameters are ``"{name}.w"`` ``(2, num_inputs, 2 * filters)``, of the earlier row and
            the present one, and ``"{name}.b"``, of f and g in this order.
        num_inputs: numbers in a row.
        filters: numbers that are added to it.
        dilation: how far back it looks.

    Reference:
        Mishra et al. (1707.03141), figure 2a and `DenseBlock`.
    """
    weights = f"{name}.w"

    def init(generator: torch.Generator) -> Params:
        w = uniform(generator, 2, num_inputs, 2 * filters, fan_in=2 * num_inputs)
        return {weights: w, f"{name}.b": torch.zeros(2 * filters)}

    def gated(params: Params, x: Tensor, earlier: Tensor) -> Tensor:
        now = torch.addmm(params[f"{name}.b"], x, params[weights][1])
        f, g = (now + earlier).chunk(2, -1)
        return torch.cat([x, torch.tanh(f) * torch.sigmoid(g)], -1)

    def over(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        padded = torch.cat([x.new_zeros(dilation, num_inputs), x])
        earlier = padded[: len(x) + 1] @ params[weights][0]
        return gated(params, x, earlier[:-1]), earlier[-1]

    def after(params: Params, kept: Tensor, x: Tensor) -> Tensor:
        return gated(params, x, kept)

    return Block(init, over, after, num_inputs + filters)


def temporal(name: str, num_inputs: int, filters: int, length: int) -> Block:
    """Dense blocks of dilations 1, 2, 4, ... until a row sees ``length`` rows, itself included.

    The paper's pseudo-code counts dilations from 2, with which a row would never see every second
    one before it; its text has them grow until all are seen, as here.

    Reference:
        Mishra et al. (1707.03141), `TCBlock`.
    """
    blocks: list[Block] = []
    for i in range(math.ceil(math.log2(length))):
        before = blocks[-1].num_outputs if blocks else num_inputs
        blocks.append(dense(f"{name}.{i}", before, filters, 2**i))
    return chain(blocks, num_inputs)


def to_outputs(name: str, num_inputs: int, num_outputs: int) -> Block:
    """An affine map of each row, a convolution 1x1; parameters ``"{name}.w"``, ``"{name}.b"``."""

    def init(generator: torch.Generator) -> Params:
        w = uniform(generator, num_inputs, num_outputs, fan_in=num_inputs)
        return {f"{name}.w": w, f"{name}.b": torch.zeros(num_outputs)}

    def over(params: Params, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return affine(params, name, x), ()

    def after(params: Params, kept: tuple[()], x: Tensor) -> Tensor:
        return affine(params, name, x)

    return Block(init, over, after, num_outputs)


def chain(blocks: Sequence[Block], num_inputs: int) -> Block:
    """The blocks one after another; they keep a tuple, one entry each."""

    def init(generator: torch.Generator) -> Params:
        return {k: v for block in blocks for k, v in block.init(generator).items()}

    def over(params: Params, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        kept = []
        for block in blocks:
            x, seen = block.over(params, x)
            kept.append(seen)
        return x, tuple(kept)

    def after(params: Params, kept: tuple[Any, ...], x: Tensor) -> Tensor:
        for block, seen in zip(blocks, kept, strict=True):
            x = block.after(params, seen, x)
        return x

    return Block(init, over, after, blocks[-1].num_outputs if blocks else num_inputs)
