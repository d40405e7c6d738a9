"""What a law of a family of tasks is, and what several of them do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.tasks import Task, TaskFamily, sample_task
from fmeta.testing._laws_step import _changed, _global_states
from fmeta.testing._registry import of_law

__all__ = ["FAMILY_LAWS", "check_scalar", "equal", "first_batch", "law", "without_global"]

Tree = Any

FAMILY_LAWS: dict[str, Callable[..., None]] = {}


def law(check: Callable[..., None]) -> Callable[..., None]:
    """Registers a law; whatever the family raises in it becomes an AssertionError."""
    name = check.__name__

    @functools.wraps(check)
    def wrapped(
        family: TaskFamily,
        *,
        split: str = "train",
        steps: int = 3,
        num_tasks: int = 3,
        seed: int = 0,
        **own: Any,
    ) -> None:
        draw = functools.partial(_drawn, family, split, steps, num_tasks, seed)
        with of_law(name, "family", f" [split {split!r}]"):
            check(family, draw, split=split, steps=steps, seed=seed, **own)

    FAMILY_LAWS[name] = wrapped
    return wrapped


def _drawn(family: TaskFamily, split: str, steps: int, num_tasks: int, seed: int) -> list[Task]:
    return [sample_task(family, steps, seed, i, split=split) for i in range(num_tasks)]


def first_batch(tree: Tree) -> Tree:
    """The first of the batches."""
    return trees.map(lambda x: x[0], tree)


def check_scalar(x: Any, name: str) -> None:
    assert isinstance(x, Tensor), f"{name} is a {type(x).__name__}, not a tensor"
    assert x.shape == (), f"{name} has shape {tuple(x.shape)}: take a mean or a sum"


def without_global(where: str, call: Callable[[], Any], cure: str) -> Any:
    before = _global_states()
    got = call()
    for name in _changed(before, _global_states()):
        raise AssertionError(f"{where} used {name}: {cure}")
    return got


def equal(one: Tree, other: Tree) -> bool:
    pairs = zip(trees.leaves(one), trees.leaves(other), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
