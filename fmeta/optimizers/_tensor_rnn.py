"""What rules with a recurrent network for each tensor share: its step, and features of a tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["LOG_RANGE", "log_size", "lstm_step", "mean_and_variance"]

LOG_RANGE = 5.0  # logarithms of sizes are cut to +- this


def lstm_step(
    w: Tensor, b: Tensor, x: Tensor, state: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of an LSTM whose forget gate starts open.

    ``[i, g, f, o] = [x, h] w + b;  c = sigmoid(f + 1) c + sigmoid(i) tanh(g);  h = sigmoid(o)
    tanh(c)``, in plain operations, which have derivatives of every order.

    Args:
        w, b: ``(F + H, 4 H)`` and ``(4 H)``.
        x: ``(L, F)``.
        state: ``h`` and ``c``, ``(L, H)``.

    Returns:
        ``(h, state)``.
    """
    i, g, f, o = (torch.cat([x, state["h"]], 1) @ w + b).chunk(4, 1)
    c = torch.sigmoid(f + 1) * state["c"] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h, {"h": h, "c": c}


def log_size(x: Tensor) -> Tensor:
    """``log |x|``, between -5 and 5; value and derivatives are finite at 0."""
    return torch.log(1e-8 + x.abs()).clamp(-LOG_RANGE, LOG_RANGE)


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Over all elements; 0 and 0 of an empty tensor."""
    if x.numel() == 0:
        return x.new_zeros(()), x.new_zeros(())
    mean = x.mean()
    return mean, (x - mean).square().mean()
