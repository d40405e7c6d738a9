"""A check that all loaders make."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_finite"]


def check_finite(x: Tensor, what: str) -> Tensor:
    """``x`` as it is; a ValueError that names it where float32 weights are infinite or NaN."""
    if not x.is_meta and not bool(x.isfinite().all()):
        count = int((~x.isfinite()).sum())
        raise ValueError(
            f"{what} holds {count} numbers that are not finite in float32: the weights are "
            "damaged, or of a training that diverged"
        )
    return x
