"""Variants of a family's tasks that an optimizer should not mind, for it to meet more of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta import trees
from fmeta.random import fold_in
from fmeta.tasks._family import TaskFamily

__all__ = ["augmented"]

Tree = Any

_OFFSETS = 2**16  # places in the bank of noise where a parameter's noise may begin


def augmented(
    family: TaskFamily,
    *,
    rescale: float = 0.0,
    permute_labels: bool = False,
    loss_scale: float = 0.0,
    gradient_noise: float = 0.0,
) -> TaskFamily:
    """A family whose tasks differ in scales, labels and noise too.

    What distinguishes the tasks is drawn with their configs and batches, as tensors, so tasks of
    different scales and labels still are of one structure.

    Args:
        family: its tasks.
        rescale: standard deviation of the logarithm of a factor s of each parameter tensor, which
            is stored as p / s: its gradient becomes s times as large.
        permute_labels: whether each task has a permutation of the labels ``data["y"]``.
        loss_scale: standard deviation of the logarithm of a factor of the task's loss.
        gradient_noise: standard deviation of Gaussian noise in every coordinate of the family's
            own gradient (before both scales), new at every step. The loss has the gradient
            of ``loss + <noise, params>`` but the value of ``loss``.

    Returns:
        A `TaskFamily`. Its ``config`` is a dict with the family's own as ``"inner"`` and, of those
        asked for, ``"scales"`` (a scalar for each parameter tensor), ``"labels"`` (classes,) and
        ``"loss_scale"`` (). Its batches are dicts with the family's own as ``"inner"``; for noise
        they have (and so does ``data``) also ``"noise"``: places in a bank of it. Metrics and
        extras are the family's own, at its own parameters and with the permuted labels: activations
        are those of the same network, whatever the scales.

    Raises:
        ValueError: for a negative number, or a label permutation without integer ``data["y"]``.
        TypeError: for anything but a `TaskFamily`.

    Reference:
        Celo2 (2602.19142) meta-trains on re-scaled tasks.
    """
    if not isinstance(family, TaskFamily):
        raise TypeError(
            f"augmented takes a TaskFamily, got a {type(family).__name__}: for a mixture, augment "
            "each of its families"
        )
    for name, value in (
        ("rescale", rescale),
        ("loss_scale", loss_scale),
        ("gradient_noise", gradient_noise),
    ):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    classes = _number_of_classes(family.data) if permute_labels else 0
    # A family has one structure, so any of its tasks tells it.
    flat, structure = trees.flatten(family.init(family.sample(fold_in(0)), fold_in(0)))
    sizes = [p.numel() for p in flat]
    data = {"inner": family.data}
    if gradient_noise:
        data["noise"] = torch.randn(_OFFSETS + max(sizes), generator=fold_in(0, _OFFSETS))

    def sample(generator: torch.Generator) -> dict[str, Any]:
        config = {"inner": family.sample(generator)}
        if rescale:
            scales = torch.exp(rescale * torch.randn(len(flat), generator=generator))
            config["scales"] = trees.unflatten(structure, scales.unbind())
        if permute_labels:
            config["labels"] = torch.randperm(classes, generator=generator)
        if loss_scale:
            config["loss_scale"] = torch.exp(loss_scale * torch.randn((), generator=generator))
        return config

    def init(config: dict[str, Any], generator: torch.Generator) -> Tree:
        params = family.init(config["inner"], generator)
        return trees.map(torch.div, params, config["scales"]) if rescale else params

    def batches(
        config: dict[str, Any], generator: torch.Generator, steps: int, split: str = "train"
    ) -> dict[str, Any]:
        drawn = {"inner": family.batches(config["inner"], generator, steps, split=split)}
        if gradient_noise:
            drawn["noise"] = torch.randint(_OFFSETS, (steps, len(flat)), generator=generator)
        return drawn

    def own(data: dict[str, Any], config: dict[str, Any], params: Tree) -> tuple[Any, Any, Tree]:
        """The task as the family knows it."""
        plain = data["inner"]
        if permute_labels:
            plain = {**plain, "y": config["labels"][plain["y"]]}
        if rescale:
            params = trees.map(torch.mul, params, config["scales"])
        return plain, config["inner"], params

    def loss(data: Any, config: dict[str, Any], params: Tree, batch: dict[str, Any]) -> Tensor:
        plain, inner, params = own(data, config, params)
        value = family.loss(plain, inner, params, batch["inner"])
        if gradient_noise:
            value = value + gradient_noise * _noise(data["noise"], params, batch["noise"])
        return value * config["loss_scale"] if loss_scale else value

    def told(inner: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """Metrics, or extras, of the task as the family knows it."""
        if inner is None:
            return None

        def outer(data: Any, config: dict[str, Any], params: Tree, batch: dict[str, Any]) -> Any:
            return inner(*own(data, config, params), batch["inner"])

        return outer

    metrics, extras = told(family.metrics), told(family.extras)
    return TaskFamily(data, sample, init, batches, loss, metrics, extras)


def _noise(bank: Tensor, params: Tree, offsets: Tensor) -> Tensor:
    """Zero, with noise as its gradient: in each parameter what begins in the bank at its offset."""
    terms = []
    for i, p in enumerate(trees.leaves(params)):
        begins = bank.unfold(0, p.numel(), 1)  # a view: what begins at each place
        noise = F.embedding(offsets[i], begins).to(p.dtype)
        terms.append((noise * (p - p.detach()).flatten()).sum())
    return torch.stack(terms).sum()


def _number_of_classes(data: Any) -> int:
    labels = data.get("y") if isinstance(data, dict) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        found = "no y" if labels is None else f"y of dtype {getattr(labels, 'dtype', type(labels))}"
        raise ValueError(
            f"permute_labels needs integer labels in the family's data['y'], got {found}: leave it "
            "out, or ask for it before other augmentations"
        )
    return int(labels.max()) + 1
