"""Laws of how a family of tasks draws them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from fmeta import trees
from fmeta.random import fold_in
from fmeta.tasks import Task, TaskFamily, sample_task
from fmeta.testing._compare import (
    assert_close,
    assert_same_tensors,
    leaf_names,
    remembered,
    short,
)
from fmeta.testing._family_law import equal, first_batch, law, without_global

Tree = Any


@law
def made_of_tensors(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Data, config, parameters and batches are trees of tensors; the parameters floating."""
    for task in draw():
        for name, tree in {"data": family.data, **task._asdict()}.items():
            for leaf, x in zip(leaf_names(tree, name), trees.leaves(tree), strict=True):
                assert isinstance(x, Tensor), (
                    f"{leaf} is a {type(x).__name__}, not a tensor: numbers that all tasks share "
                    "belong to the builder of the family, others become tensors"
                )
                assert name != "model_params" or x.is_floating_point(), (
                    f"{leaf} is {short(x.dtype)}: parameters are floating; put others into config"
                )


@law
def inputs_unchanged(
    family: TaskFamily, draw: Callable[[], list[Task]], *, split: str, steps: int, seed: int
) -> None:
    """No function of the family edits its arguments, neither tensors nor containers."""
    task = draw()[0]
    config = family.sample(fold_in(seed))  # the task's own has been through `init` already
    named = {
        "data": family.data,
        "config": config,
        "model_params": task.model_params,
        "batch": first_batch(task.batches),
    }
    before = {name: remembered(tree) for name, tree in named.items()}
    calls: dict[str, Callable[[], Any]] = {
        "init": lambda: family.init(config, fold_in(seed)),
        "batches": lambda: family.batches(config, fold_in(seed), steps, split=split),
        "loss": lambda: family.loss(*named.values()),
    }
    if family.metrics is not None:
        metrics = family.metrics
        calls["metrics"] = lambda: metrics(*named.values())
    if family.extras is not None:
        extras = family.extras
        calls["extras"] = lambda: extras(*named.values())
    for where, call in calls.items():
        call()
        for name, tree in named.items():
            assert_same_tensors(before[name], tree, name, where)


@law
def drawn_from_generator_alone(
    family: TaskFamily, draw: Any, *, split: str, steps: int, seed: int
) -> None:
    """Equal generators give equal draws, whatever else was drawn; the global ones are not used."""
    config = family.sample(fold_in(seed, 0))
    calls: dict[str, Callable[[], Tree]] = {
        "sample": lambda: family.sample(fold_in(seed, 0)),
        "init": lambda: family.init(config, fold_in(seed, 1)),
        "batches": lambda: family.batches(config, fold_in(seed, 2), steps, split=split),
    }
    for where, call in calls.items():
        got = without_global(where, call, "draw from the generator given to it")
        assert_close(call(), got, where, "with an equal generator once more", rtol=0)
    one, other = (family.batches(config, fold_in(seed, i), steps, split=split) for i in (2, 3))
    assert not equal(one, other), (
        "batches are the same for another generator: draw them from it, or tasks and seeds will "
        "not differ"
    )


@law
def steps_lead(family: TaskFamily, draw: Any, *, split: str, steps: int, seed: int) -> None:
    """The leading dimension of every tensor in the batches is the number of steps."""
    config = family.sample(fold_in(seed, 0))
    for number in (steps, 1, steps + 2):
        drawn = family.batches(config, fold_in(seed, 2), number, split=split)
        flat = trees.leaves(drawn)
        assert flat, "batches hold no tensor: give at least a tensor of `steps` indices or zeros"
        for leaf, x in zip(leaf_names(drawn, "batches"), flat, strict=True):
            assert x.shape[:1] == (number,), (
                f"{leaf} has shape {tuple(x.shape)} for {number} steps: its leading dimension must "
                "be the steps; what all of them share belongs to data or config"
            )


@law
def splits_differ(
    family: TaskFamily,
    draw: Callable[[], list[Task]],
    *,
    split: str,
    steps: int,
    seed: int,
    others: Collection[str] = ("train", "validation", "test"),
) -> None:
    """Another split has other batches, while config and initial parameters are the same."""
    task = draw()[0]
    for other in others:
        if other == split:
            continue
        there = sample_task(family, steps, seed, 0, split=other)
        assert not equal(task.batches, there.batches), (
            f"the batches are those of split {other!r} too: draw them from the split's images, or "
            "from the generator"
        )
        assert_close(there[:2], task[:2], "(config, model_params)", f"in split {other!r}", rtol=0)
