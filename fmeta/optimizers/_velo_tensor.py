"""What `velo` knows of a whole tensor and of the training: the inputs of its recurrent network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta.optimizers._features import is_unobserved

__all__ = ["INPUTS", "inputs", "mixed", "start_losses", "summary", "training"]

Tree = Any

# fraction of the training, losses, mean rms, rank, variance of m, variance of rms
INPUTS = 9 + 9 + 1 + 5 + 3 + 3
_FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
_HALF_LIVES = 10
_RANKS = 5
_CHUNK = 2**15  # coordinates whose deviations from their mean stay in cache


def summary(p: Tensor, h: Mapping[str, Tensor], batch: int = 0) -> Tensor:
    """What is seen of a tensor, ``(8,)``: its parameters, and the moments before this gradient.

    With s = 1 / rms(p): log of ``s mean(v)``; log of ``s^2 var(m)``, and of ``s^2 mean((v -
    mean(m))^2)``, for each of the three momenta; number of axes longer than one.

    Args:
        batch: 1 for a stack of leaves: ``(B, 8)``.
    """
    lead = p.shape[:batch]
    rank = p.new_full((*lead, 1), float(sum(n > 1 for n in p.shape[batch:])))
    if p.numel() == 0:
        return torch.cat([_log(p.new_zeros(*lead, 7)), rank], -1)
    planes = [h["rms"], h["m0"], h["m1"], h["m2"]]
    if batch:
        p, *planes = (x.reshape(*lead, -1) for x in (p, *planes))
    dims = tuple(range(batch, p.ndim))
    chunked = not batch and p.device.type == "cpu" and p.numel() > _CHUNK
    if chunked and is_unobserved(p, *planes):
        square = torch.linalg.vector_norm(p).square() / p.numel()
        moments = [_chunked_moments(x) for x in planes]
    else:
        square = p.square().mean(dims)
        moments = [_moments(x, dims) for x in planes]
    scale = torch.rsqrt(square.clamp_min(1e-9)).unsqueeze(-1)
    mean, mean_m = torch.stack([mean for mean, _ in moments], -1).split((1, 3), -1)
    var, var_m = torch.stack([variance for _, variance in moments], -1).split((1, 3), -1)
    spread = var + (mean - mean_m).square()  # = mean((v - mean(m))^2), without cancellation
    return torch.cat(
        [_log(mean * scale), _log(var_m * scale.square()), _log(spread * scale.square()), rank], -1
    )


def inputs(seen: Tensor, summaries: Tensor) -> Tensor:
    """``(L, 30)``, in the order of the weights.

    Args:
        seen: of `training`, ``(18,)``.
        summaries: of `summary`, ``(L, 8)``.
    """
    mean, spreads, rank = summaries.split((1, 6, 1), 1)
    ranks = torch.arange(_RANKS, dtype=rank.dtype, device=rank.device)
    one_hot = (rank == ranks).to(rank.dtype)
    seen = seen.to(rank.dtype).expand(rank.shape[0], -1)
    return torch.cat([seen, mean, one_hot, spreads], 1)


def start_losses(num_steps: Tensor) -> dict[str, Tensor]:
    """Averages of the loss with ten half-lives, and their lowest values, before the first step."""
    means = num_steps.new_zeros(_HALF_LIVES)
    return {"losses": means, "lowest": torch.full_like(means, 999999999999.0)}


def training(shared: Mapping[str, Tensor], loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The inputs that all tensors share, ``(18,)``, and the averages after this loss.

    Of the fraction of the training that is done, and of how the averages of the loss stand between
    their lowest value and the next slower average.

    Args:
        shared: ``t``, ``num_steps``, ``losses``, ``lowest``.
        loss: scalar; more than twice the largest average counts as twice that.
    """
    old, total = shared["losses"], shared["num_steps"]
    t, loss = shared["t"].to(old.dtype), loss.to(old.device, old.dtype)
    decays = _decays(total)
    # Once more than there were losses: they come out too small in the first steps.
    largest = (old / (1 - decays ** (t + 1))).amax(0)
    largest = torch.where(t == 0, loss, largest)
    loss = torch.minimum(2 * largest.abs(), loss)
    losses = old * decays + loss * (1 - decays)
    means = losses / (1 - decays ** (t + 1))
    lowest = torch.minimum(shared["lowest"], means)
    count = _HALF_LIVES - 1
    low, slower = lowest.narrow(0, 0, count), means.narrow(0, 1, count)
    height = (means.narrow(0, 0, count) - low) / (slower - low).clamp_min(1e-8)
    seen = torch.where(t < 2, 0.0, (height - 1).clamp(-1, 1))
    done = t / total  # no tensor is made of the constants: transforms on meta tensors refuse it
    fraction = torch.tanh(torch.stack([10 * (done - x) for x in _FRACTIONS]))
    new = {"t": shared["t"] + 1, "num_steps": total, "losses": losses, "lowest": lowest}
    return torch.cat([fraction, seen]), new


def mixed(
    rnn: Mapping[str, Tensor], x: Tensor, state: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One step of the recurrent network, for L tensors.

    Args:
        x: ``(L, 30)``.
        state: ``h`` and ``c``, ``(L, H)``.

    Returns:
        ``(controls, rate, state)``: ``(L, P)`` and ``(L, 1)``.
    """
    of_all = torch.relu(x @ rnn["mix_w"] + rnn["mix_b"]).amax(0)
    x = x @ rnn["in_w"] + rnn["in_b"] + of_all
    gates = torch.cat([x, state["h"]], 1) @ rnn["lstm_w"] + rnn["lstm_b"]
    i, g, f, o = gates.chunk(4, 1)
    c = torch.sigmoid(f + 1) * state["c"] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    controls = h @ rnn["control_w"] + rnn["control_b"]
    return controls, h @ rnn["rate_w"] + rnn["rate_b"], {"h": h, "c": c}


def _decays(num_steps: Tensor) -> Tensor:
    """Of averages whose half-lives go from 10 to ``num_steps`` in equal ratios."""
    i = torch.arange(_HALF_LIVES, device=num_steps.device, dtype=num_steps.dtype)
    return torch.exp(-(10 ** -(1 + (torch.log10(num_steps) - 1) * i / (_HALF_LIVES - 1))))


def _log(x: Tensor) -> Tensor:
    return torch.log(1e-8 + 10 * x).clamp(-5, 5) * 0.5


def _moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance over these axes."""
    mean = x.mean(dims, keepdim=True)
    return mean.reshape(x.shape[: x.ndim - len(dims)]), (x - mean).square().mean(dims)


def _chunked_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in little memory, each chunk read once; has no derivative."""
    chunks = x.reshape(-1).split(_CHUNK)
    memory = torch.empty_like(chunks[0])
    means = [chunk.mean() for chunk in chunks]
    squares = []
    for chunk, mean in zip(chunks, means, strict=True):
        off = torch.sub(chunk, mean, out=memory[: chunk.numel()])
        squares.append(torch.linalg.vector_norm(off).square())
    own = torch.stack(means)
    counts = own.new_tensor([chunk.numel() for chunk in chunks])
    mean = (own * counts).sum() / x.numel()
    between = ((own - mean).square() * counts).sum()
    return mean, (torch.stack(squares).sum() + between) / x.numel()
