"""`orthogonalize`: a gradient transform, the one of Muon."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fmeta import _newton_schulz
from fmeta._leafwise import transforms_gradients
from fmeta._lift import lift
from fmeta._numbers import nothing_to_learn
from fmeta.combinators._wrapped import whole
from fmeta.optimizer import Optimizer

__all__ = ["orthogonalize"]

Tree = Any


def orthogonalize(steps: int = 5) -> Optimizer:
    """A transform for `chain`: sets all singular values of matrices to about one.

    Newton-Schulz iterations on each leaf of two or more axes. A kernel ``(first, ...)`` is the
    matrix ``(first, rest)``. Leaves of fewer axes pass as they are.

    Args:
        steps: number of iterations. With 5, singular values end between about 0.7 and 1.2, unless
            they were below a thousandth of the matrix's norm.

    Returns:
        An `Optimizer` without hidden state.

    Raises:
        ValueError: ``steps`` is no integer, or below 1.

    Example:
        >>> import fmeta, torch
        >>> rule = orthogonalize()
        >>> p = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
        >>> g = {"w": torch.diag(torch.tensor([30.0, 1.0])), "b": torch.tensor([30.0, 1.0])}
        >>> delta, _ = rule.update({}, p, g, rule.init_hidden({}, p))
        >>> (delta["w"].diag() - 1).abs().max() < 0.35, delta["b"]
        (tensor(True), tensor([30.,  1.]))

    Reference:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    whole("steps", steps)

    def init_leaf(opt_params: Tree, param: Tensor) -> dict[str, Tensor]:
        return {}

    def update_leaf(
        opt_params: Tree, param: Tensor, grad: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if grad.ndim < 2:
            return grad, state
        matrix = grad.flatten(1)
        return _newton_schulz.orthogonalize(matrix, steps).reshape(grad.shape), state

    rule = lift(nothing_to_learn, init_leaf, update_leaf)
    transforms_gradients(rule.update)
    return rule
