"""Labels that stand for no class, which learners that compare them would not notice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fmeta._autodiff import inside_transform

__all__ = ["check_labels"]


def check_labels(y: Tensor, ways: int, what: str, *, every: bool = False) -> None:
    """Raises an error unless these are integers from 0 to ``ways`` - 1.

    Values are looked at where they are at hand: on the CPU, outside of all transforms, not while
    operations are recorded. To look at those of a GPU is to wait for it; labels of a source are
    checked by `draw`, before they go there.

    Args:
        y: labels ``(..., n)``.
        ways: how many classes there are.
        what: they belong to.
        every: whether each class must have an example among the n.

    Raises:
        TypeError: labels that are no integers.
        ValueError: labels out of range; a class without example.
    """
    if y.is_floating_point() or y.is_complex() or y.dtype is torch.bool:
        raise TypeError(
            f"labels y of {what} must be integers from 0 to {ways - 1}, got {y.dtype}: give "
            "y.long()"
        )
    if not _can_be_read(y):
        return
    low, high = (int(x) for x in y.aminmax())
    if low < 0 or high >= ways:
        raise ValueError(
            f"labels y of {what} go from {low} to {high}, but there are {ways} ways: number the "
            f"classes of an episode from 0 to {ways - 1}"
        )
    if every:
        seen = (y[..., None] == torch.arange(ways, device=y.device)).any(-2)
        missing = (~seen).nonzero()
        if len(missing):
            raise ValueError(
                f"class {int(missing[0, -1])} has no example in {what}, and so no prototype: give "
                f"at least one of each of the {ways} classes"
            )


def _can_be_read(y: Tensor) -> bool:
    return (
        type(y) is Tensor
        and y.device.type == "cpu"
        and not inside_transform()
        and _get_current_dispatch_mode() is None
    )
