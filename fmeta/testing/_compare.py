"""Comparisons of trees that say which leaf differs, and how."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from fmeta import trees

__all__ = [
    "assert_close",
    "assert_same_kinds",
    "assert_same_tensors",
    "leaf_names",
    "remembered",
    "short",
]

Tree = Any


def leaf_names(tree: Tree, name: str) -> list[str]:
    """Each leaf as one would write it in Python: ``hidden.leaves['w']['m']``."""
    return [a.codify(name) for a in optree.tree_accessors(tree, none_is_leaf=True)]


def assert_same_kinds(before: Tree, after: Tree, name: str, where: str, cure: str) -> None:
    """Raises unless structure, shapes and dtypes of two trees are the same."""
    rows = _rows(before, after, name, where)
    for leaf, old, new in rows:
        for x, when in ((old, "before"), (new, f"after {where}")):
            assert x is None or isinstance(x, Tensor), (
                f"{leaf} is a {type(x).__name__} {when}, not a tensor: keep counts and numbers as "
                "tensors, so that they can be batched, saved and compiled"
            )
        if old is None or new is None:
            assert old is new, f"{leaf} was {_kind(old)}, became {_kind(new)} in {where}"
            continue
        assert new.dtype == old.dtype, (
            f"{leaf} became {short(new.dtype)} in {where}, was {short(old.dtype)}: {cure}"
        )
        assert new.shape == old.shape, (
            f"{leaf} has shape {tuple(new.shape)} after {where}, had {tuple(old.shape)}: shapes "
            "must stay"
        )
        assert new.device == old.device, (
            f"{leaf} is on {new.device} after {where}, was on {old.device}: build tensors on the "
            "device of the parameters"
        )


def assert_close(
    got: Tree, want: Tree, name: str, where: str, *, rtol: float = 1e-9, atol: float | None = None
) -> None:
    """Raises unless two trees are numerically equal, naming leaf and difference."""
    for leaf, x, y in _rows(want, got, name, where):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            assert x is y or x == y, f"{leaf} {where}: got {_kind(y)}, want {_kind(x)}"
            continue
        assert x.shape == y.shape, (
            f"{leaf} {where}: got shape {tuple(y.shape)}, want {tuple(x.shape)}"
        )
        x, y = x.detach().double(), y.detach().double()
        if not x.numel():
            continue
        gap = (x - y).abs()
        limit = rtol * x.abs().max() if atol is None else atol + rtol * x.abs()
        bad = ~((gap <= limit) | (x == y) | (x.isnan() & y.isnan()))
        if bool(bad.any()):
            at = int(torch.where(bad, gap.nan_to_num(torch.inf), -1.0).argmax())
            raise AssertionError(
                f"{leaf} {where}: at flat index {at} got {float(y.flatten()[at]):.9g}, want "
                f"{float(x.flatten()[at]):.9g}"
            )


def assert_same_tensors(before: list[Any], tree: Tree, name: str, where: str) -> None:
    """Raises unless a tree still holds the very tensors of `remembered`, with their values."""
    after, names = trees.leaves(tree), leaf_names(tree, name)
    assert len(after) == len(before), (
        f"{where} changed its argument {name} in place: {len(before)} leaves became {len(after)}; "
        "build a new tree"
    )
    for leaf, (old, value), new in zip(names, before, after, strict=True):
        assert new is old, f"{where} put something else at {leaf} of its argument: build a new tree"
        if value is not None:
            assert torch.equal(value, new.detach()), (
                f"{where} changed its argument {leaf} in place: use out-of-place operations"
            )


def remembered(tree: Tree) -> list[Any]:
    """The leaves of a tree beside copies of their values."""
    return [(x, x.detach().clone() if isinstance(x, Tensor) else None) for x in trees.leaves(tree)]


def _rows(before: Tree, after: Tree, name: str, where: str) -> list[tuple[str, Any, Any]]:
    old, new = trees.leaves(before), trees.leaves(after)
    names, others = leaf_names(before, name), leaf_names(after, name)
    if sorted(names) != sorted(others):
        lost = ", ".join(sorted(set(names) - set(others))[:3]) or "nothing"
        extra = ", ".join(sorted(set(others) - set(names))[:3]) or "nothing"
        raise AssertionError(
            f"the structure of {name} changed in {where}: {lost} disappeared, {extra} appeared"
        )
    at = {n: x for n, x in zip(others, new, strict=True)}
    return [(n, x, at[n]) for n, x in zip(names, old, strict=True)]


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return "None" if x is None else f"{x!r}"


def short(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
