"""Newton-Schulz iterations: a matrix with all its singular values moved to about one."""

from __future__ import annotations

from torch import Tensor

from fmeta._roots import safe_sqrt

__all__ = ["orthogonalize"]

# Of the quintic a x + b x^3 + c x^5 that drives singular values into about [0.7, 1.2] (Jordan).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with orthogonal rows (or columns), about: the same singular vectors.

    Args:
        x: ``(*, rows, columns)``.
        steps: number of iterations.

    Reference:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller of the two Gram matrices
    x = x / (safe_sqrt(x.square().sum((-2, -1), keepdim=True)) + 1e-8)
    for _ in range(steps):
        a = x @ x.mT
        x = _A * x + (_B * a + _C * a @ a) @ x
    return x.mT if tall else x
