"""What a family of tasks is, and how one task is drawn from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.optimizer import Optimizer
from fmeta.random import fold_in

__all__ = [
    "SPLITS",
    "Task",
    "TaskFamily",
    "check_split",
    "device_of_tasks",
    "extras_of_task",
    "loss_of_task",
    "sample_batches",
    "sample_task",
    "stack_tasks",
]


class TaskFamily(NamedTuple):
    """Tasks of one static structure, as pure functions. Only ``loss`` is ever vmapped.

    Attributes:
        data: tensors shared by all tasks, stored once.
        sample: ``sample(generator) -> config``, tree of tensors that makes a task.
        init: ``init(config, generator) -> model_params``.
        batches: ``batches(config, generator, steps, split="train") -> batches``, tree of tensors
            with leading dimension ``steps``; small: indices, or noise, that ``loss`` works out.
        loss: ``loss(data, config, model_params, batch) -> scalar``.
        metrics: ``metrics(data, config, model_params, batch) -> {name: scalar}``: what to tell
            beside the loss, ``accuracy`` say; None: nothing.
        extras: ``extras(data, config, model_params, batch) -> {name: tree}``: what rules may need
            beside the gradient, by the names of their ``needs``, at these parameters; None:
            nothing. It is called for rules that need it only. ``"activations"`` are a list of
            layers as `fmeta.functional.layer_activity` makes them.
    """

    data: Any
    sample: Callable[..., Any]
    init: Callable[..., Any]
    batches: Callable[..., Any]
    loss: Callable[..., Tensor]
    metrics: Callable[..., dict[str, Tensor]] | None = None
    extras: Callable[..., dict[str, Any]] | None = None


class Task(NamedTuple):
    """One drawn task."""

    config: Any
    model_params: Any
    batches: Any


SPLITS = ("train", "validation", "test")

# What a draw is for: the last integer folded into its seed.
_CONFIG, _INIT, _BATCHES = 0, 1, 2


def sample_task(
    family: TaskFamily, steps: int, seed: int, *ints: int, split: str = "train"
) -> Task:
    """One task with its initial parameters and batches; a function of the integers alone.

    Args:
        family: where it comes from.
        steps: number of batches T.
        seed: of the run.
        *ints: what the draw is for (outer step, task index).
        split: which images (or points) the batches are from; each split has a stream of its own.
    """
    with _naming(seed, *ints):
        config = family.sample(fold_in(seed, *ints, _CONFIG))
        params = family.init(config, fold_in(seed, *ints, _INIT))
    return Task(config, params, sample_batches(family, config, steps, seed, *ints, split=split))


def sample_batches(
    family: TaskFamily, config: Any, steps: int, seed: int, *ints: int, split: str = "train"
) -> Any:
    """The batches alone of a task whose config is drawn already, those of another split say.

    Args:
        family, steps, split: as in `sample_task`.
        seed: first of the integers of the draw.
        *ints: the others.
        config: the task's config.

    Returns:
        What `sample_task` with these arguments has as ``batches``.
    """
    # Two splits with one stream would pick images of the same ranks, and equal noise.
    key = (_BATCHES,) if split == "train" else (_BATCHES, _integer(split))
    with _naming(seed, *ints):
        return family.batches(config, fold_in(seed, *ints, *key), steps, split=split)


@contextmanager
def _naming(*ints: int) -> Iterator[None]:
    """An error from inside says which task it was, so that it can be drawn again."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"while the task of the integers {ints} was drawn: "
            f"fmeta.tasks.sample_task(family, 1, {', '.join(map(str, ints))}) draws it again"
        )
        raise


def _integer(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def stack_tasks(tasks: list[Any], device: torch.device | None = None) -> Any:
    """Tasks (or batches) side by side, along a new leading dimension, for `vmap`.

    Args:
        tasks: drawn on the CPU, all of one structure.
        device: where they are moved to; None: they stay where they are.
    """
    stacked = trees.stack(tasks)
    if device is None:
        return stacked
    return trees.map(lambda x: x.to(device), stacked)


def device_of_tasks(family: TaskFamily, *others: Any) -> torch.device | None:
    """Where tasks are to be worked on: with the family's data, else with the first other tensor."""
    for x in trees.leaves((family.data, *others)):
        if isinstance(x, Tensor):
            return x.device
    return None


def check_split(split: str) -> None:
    """Raises a ValueError unless there is a split of this name."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")


def extras_of_task(family: TaskFamily, optimizer: Optimizer) -> Callable[..., Any] | None:
    """What the optimizer needs beside the gradient, in the form `fmeta.unroll` takes as ``extras``.

    Args:
        family: the one that gives it.
        optimizer: the rule that needs it.

    Returns:
        ``extras(params, batch, config) -> dict`` for ``loss_args=(config,)``, or None for a rule
        that needs loss and horizon at most.

    Raises:
        ValueError: the family does not give what the rule needs (with the names); to know, a task
            is drawn and tried.
    """
    names = optimizer.needs - {"loss", "num_steps"}
    if not names:
        return None
    give = family.extras
    listed = ", ".join(sorted(names))
    example = (
        f"family._replace(extras=lambda data, config, model_params, batch: {{{min(names)!r}: ...}})"
    )
    if give is None:
        raise ValueError(
            f"this optimizer needs {listed}, but the family has no `extras` to give them: take a "
            f"family that has, as fmeta.tasks.digits(), or {example}"
        )

    def extras(params: Any, batch: Any, config: Any) -> Any:
        return give(family.data, config, params, batch)

    task = sample_task(family, 1, 0)
    config, params, batch = task.config, task.model_params, trees.map(lambda x: x[0], task.batches)
    device = device_of_tasks(family)
    if device is not None:
        config, params, batch = trees.map(lambda x: x.to(device), (config, params, batch))
    with torch.no_grad():
        found = extras(params, batch, config)
    missing = sorted(names - set(found))
    if missing:
        raise ValueError(
            f"this optimizer needs {', '.join(missing)}, but the family's `extras` give "
            f"{', '.join(sorted(found)) or 'nothing'}: {example}"
        )
    return extras


def loss_of_task(family: TaskFamily) -> Callable[..., Tensor]:
    """The family's loss in the form `fmeta.unroll` takes, with ``loss_args=(config,)``."""

    def loss_fn(params: Any, batch: Any, config: Any) -> Tensor:
        return family.loss(family.data, config, params, batch)

    return loss_fn
