"""Losses of predictions, and how often they are right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.tasks._networks import cross_entropy

__all__ = ["LOSSES", "Loss", "accuracy_of", "loss_named"]

Loss = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"cross_entropy wants integer labels, got {labels.dtype}: give "
            'loss="mse" for targets that are numbers, y.long() for labels'
        )
    if outputs.ndim != 2 or outputs.shape[:1] != labels.shape:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)} of an episode do not "
            "belong together: a network must give a row (n, ways) for each of n labels (n,)"
        )
    try:
        return cross_entropy(_wide(outputs), labels)
    except RuntimeError as error:  # below transforms no value can be looked at
        if "out of bounds" not in str(error):
            raise
        raise ValueError(
            f"an episode has labels y that are not from 0 to {outputs.shape[1] - 1}, of which the "
            f"network has an output each ({error}): number the classes of an episode from 0, and "
            "give the network as many outputs as there are ways"
        ) from None


def _mse(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape != targets.shape:  # torch would repeat one along the other
        raise ValueError(
            f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} of an episode "
            "differ in shape: give targets y of shape (n, outputs), y[:, None] for single numbers"
        )
    return F.mse_loss(_wide(outputs), targets)


def _wide(outputs: Tensor) -> Tensor:
    """In float32 under autocast, which makes outputs narrow and not losses."""
    kind = outputs.device.type
    known = torch.amp.is_autocast_available(kind)  # not of meta tensors
    return outputs.float() if known and torch.is_autocast_enabled(kind) else outputs


LOSSES: dict[str, Loss] = {"cross_entropy": _cross_entropy, "mse": _mse}


def loss_named(loss: str | Loss) -> Loss:
    """The loss of this name, or the function ``loss(outputs, y) -> scalar`` itself."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(
            f"unknown loss {loss!r}: there are {', '.join(LOSSES)}, or give a function "
            "(outputs, y) -> scalar"
        )
    return LOSSES[loss]


def accuracy_of(outputs: Tensor, y: Tensor) -> Tensor:
    """Part of the labels that are predicted; NaN where ``y`` are no labels."""
    if y.is_floating_point():
        return outputs.new_full((), torch.nan)
    return (outputs.argmax(-1) == y).to(outputs.dtype).mean()
