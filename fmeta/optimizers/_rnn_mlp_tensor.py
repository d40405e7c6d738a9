"""What the recurrent network of `rnn_mlp` sees: of a tensor, of the losses; and the clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fmeta.optimizers._common import safe_sqrt
from fmeta.optimizers._tensor_rnn import log_size, mean_and_variance

__all__ = [
    "INPUTS",
    "after_loss",
    "after_valid_loss",
    "clip_limit",
    "inputs",
    "split",
    "start",
    "summary",
]

INPUTS = 18  # beside what the two networks say
_AXES = 4
_BEFORE_LOSSES, _AFTER_LOSSES = 13, 3  # of the inputs of a tensor, in the order of the weights
_TRAIN_DECAY, _VALID_DECAY = 0.9, 0.95
_CLIP_DECAY, _CLIP_FACTOR = 0.99, 10.0
_EPS = 1e-8


def start(like: Tensor) -> dict[str, Tensor]:
    """The state of losses and clipping before the first step, in the dtype of ``like``."""
    state = {"clip": like.new_full((), 1 - _CLIP_DECAY)}
    for kind in ("train", "valid"):
        state |= {f"{kind}_mean": like.new_zeros(()), f"{kind}_var": like.new_zeros(())}
        state[f"{kind}_count"] = torch.zeros_like(like.sum(), dtype=torch.int64)
    return state


def clip_limit(shared: Mapping[str, Tensor]) -> Tensor:
    """What the elements of the gradients are clipped to."""
    t = shared["train_count"].to(shared["clip"].dtype) + 1
    return _CLIP_FACTOR * shared["clip"] / (1 - _CLIP_DECAY**t)


def summary(p: Tensor, g: Tensor, h: Mapping[str, Tensor]) -> Tensor:
    """What is seen of a tensor, and the mean square of its gradient, ``(M + 17,)``.

    Args:
        p, g: parameters and clipped gradient, ``(*leaf)``; what is seen of an empty leaf are zeros.
        h: ``m`` and ``v`` after this gradient, ``(*leaf, D)``, and ``from_mlp``, ``(M,)``.
    """
    (mean_m, var_m), (mean_v, var_v) = mean_and_variance(h["m"]), mean_and_variance(h["v"])
    mean_p, var_p = mean_and_variance(p)
    norms = [safe_sqrt(x.square().sum()) for x in (g, p)]
    sizes = log_size(torch.stack([*norms, mean_m, mean_v, mean_p, var_m, var_v, var_p]))
    norm_g, norm_p, size_m, size_v, size_p, *variances = sizes.unbind(0)
    sign_m, sign_v, sign_p = torch.stack([mean_m, mean_v, mean_p]).sign().unbind(0)
    lengths = [*p.shape, *[1] * _AXES][:_AXES]
    axes = [p.new_full((), math.log(max(n, 1)) - 1) for n in lengths]
    scalar = p.new_full((), -1.0 if p.ndim else 1.0)
    seen = [norm_g, scalar, size_m, sign_m, size_v, sign_v, size_p, sign_p, norm_p, *axes]
    square, _ = mean_and_variance(g * g)
    return torch.cat([h["from_mlp"], torch.stack([*seen, *variances, square])])


def split(summaries: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees of each tensor, ``(L, M + 16)``, and the mean squares, ``(L,)``."""
    seen, square = summaries.split((summaries.shape[1] - 1, 1), 1)
    return seen, square.squeeze(1)


def inputs(seen: Tensor, from_rnn: Tensor, losses: Tensor) -> Tensor:
    """``(L, from_rnn + M + 18)``, in the order of the weights.

    Args:
        seen: of `split`.
        from_rnn: what the network said to all tensors in the step before.
        losses: of `after_loss`, ``(2,)``.
    """
    count, width = seen.shape
    first, last = seen.split((width - _AFTER_LOSSES, _AFTER_LOSSES), 1)
    return torch.cat([from_rnn.expand(count, -1), first, losses.expand(count, -1), last], 1)


def after_loss(
    shared: dict[str, Tensor], loss: Tensor, squares: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is seen of the losses, ``(2,)``, and the state after a step of training.

    The training loss, and the average of the validation losses, each less the average of the
    training losses and divided by their standard deviation.

    Args:
        squares: mean squares of the clipped gradients, one for each tensor.
    """
    shared = _averaged(shared, loss, "train", _TRAIN_DECAY)
    correction = _correction(shared, "train", _TRAIN_DECAY)
    valid = shared["valid_mean"] * _correction(shared, "valid", _VALID_DECAY)
    found = torch.stack([loss.to(valid.device, valid.dtype), valid])
    scale = torch.rsqrt(shared["train_var"] * correction + _EPS)
    seen = ((found - shared["train_mean"] * correction) * scale).clamp(-5, 5)
    size = torch.sqrt(_EPS + squares.mean()).to(valid.dtype)
    clip = _CLIP_DECAY * shared["clip"] + (1 - _CLIP_DECAY) * size
    return seen, {**shared, "clip": clip}


def after_valid_loss(shared: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """The state after a validation loss."""
    return _averaged(shared, loss, "valid", _VALID_DECAY)


def _averaged(
    shared: dict[str, Tensor], loss: Tensor, kind: str, decay: float
) -> dict[str, Tensor]:
    old = shared[f"{kind}_mean"]
    loss = loss.to(old.device, old.dtype)
    mean = decay * old + (1 - decay) * loss
    # The variance is about the new mean: smaller than about the old one.
    var = decay * shared[f"{kind}_var"] + (1 - decay) * (mean - loss).square()
    count = shared[f"{kind}_count"] + 1
    return {**shared, f"{kind}_mean": mean, f"{kind}_var": var, f"{kind}_count": count}


def _correction(shared: Mapping[str, Tensor], kind: str, decay: float) -> Tensor:
    """Of an average for its start at zero: finite, 1e8, where nothing was seen."""
    count = shared[f"{kind}_count"].to(shared["clip"].dtype)
    return 1 / (1 - decay**count + _EPS)
