"""Activations for parameter trees that belong to no network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees

__all__ = ["activations_beside"]


def activations_beside(params: Any, batch: int = 3) -> dict[str, Any]:
    """Extras for the laws of a rule that needs activations: a layer for each leaf of any tree.

    The activity is a smooth function of the leaf: sums over its first axis go in, sums over the
    others come out, and each layer is told an error. Permuting the indices along an axis of the
    leaf permutes the activity of the units there.

    Args:
        params: tree of floating tensors.
        batch: number of samples.

    Returns:
        ``{"activations": layers}`` in the form of `fmeta.functional.layer_activity`.

    Example:
        >>> import fmeta
        >>> rule = fmeta.optimizers.hebbian_mlp()
        >>> laws = ["inputs_unchanged", "vmap_equals_loop"]
        >>> report = fmeta.testing.check_optimizer(rule, extras=activations_beside, laws=laws)
        >>> list(report.held) == laws
        True
    """
    pairs = zip(trees.paths(params), trees.leaves(params), strict=True)
    return {"activations": [{path: _beside(p, batch)} for path, p in pairs if p is not None]}


def _beside(p: Tensor, batch: int) -> dict[str, Tensor]:
    others = tuple(range(1, p.ndim))
    after = p.sum(others, keepdim=True) if others else p
    before = p.sum(0, keepdim=True) if p.ndim else p
    rows = torch.arange(batch, device=p.device).reshape(-1, *(1,) * p.ndim).to(p.dtype)
    return {
        "inputs": torch.sin(0.7 * before + rows + 0.3),
        "outputs": torch.cos(after - 0.4 * rows),
        "error": torch.sin(1.3 * after + 2 * rows),
    }
