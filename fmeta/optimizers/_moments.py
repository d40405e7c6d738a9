"""What the relatives of Adam share: checks of their numbers, and corrected averages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fmeta import trees
from fmeta.optimizers._common import check_numbers, safe_sqrt

__all__ = ["check_all", "check_betas", "full_root", "is_off", "look_ahead", "varies_within_leaf"]


def check_all(**numbers: Any) -> None:
    """`check_numbers` of several arguments by name."""
    for name, value in numbers.items():
        check_numbers(name, value)


def check_betas(betas: Any) -> tuple[Any, Any]:
    """The two of a pair of decay rates.

    Raises:
        ValueError: no pair, or a number that is negative or not below 1.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair, got {betas!r}")
    for i, beta in enumerate(betas):
        check_numbers(f"betas[{i}]", beta, below=1.0)
    return betas[0], betas[1]


def is_off(value: Any) -> bool:
    """Whether this is the Python number 0, whose term is left out (a tensor may be learned)."""
    return isinstance(value, (int, float)) and value == 0


def varies_within_leaf(*values: Any) -> bool:
    """Whether a number is given for each coordinate, so that what is made of it needs a state."""
    return any(isinstance(x, Tensor) and x.ndim > 0 for v in values for x in trees.leaves(v))


def full_root(v: Tensor, correction: Any, eps: Any, eps_root: Any = 0.0) -> Tensor:
    """``sqrt(v / correction + eps_root) + eps``, with a finite derivative at v = 0."""
    mean = v / correction
    return safe_sqrt(mean if is_off(eps_root) else mean + eps_root) + eps


def look_ahead(m: Tensor, g: Tensor, beta: Any, correction: Tensor) -> Tensor:
    """Nesterov's mean: the corrected average that a second step with the same gradient would have.

    ``beta m / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t)``, of ``correction = 1 - beta^t``.
    """
    return beta * m / ((1 - beta) + beta * correction) + (1 - beta) * g / correction
