"""Points from a few random Gaussians: the data of small problems, drawn with each task."""

from __future__ import annotations

import torch
from torch import Tensor

from fmeta.tasks._family import SPLITS, check_split

__all__ = ["balanced_labels", "check_numbers", "gaussian_points", "shuffled"]


def gaussian_points(
    generator: torch.Generator,
    clusters: int,
    points: int,
    dim: int,
    *,
    identity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Points of as many Gaussians as there are clusters, for every split.

    Means are standard normal. Covariances are ``A A' / dim`` with A standard normal, or the
    identity.

    Args:
        generator: draws them.
        clusters: Gaussians.
        points: of each split, evenly over clusters as far as they go.
        dim: of a point.
        identity: whether covariances are the identity.

    Returns:
        ``(x, cluster)``: ``(splits * points, dim)``, one split after the other, and ``(splits *
        points,)``, the integers of their Gaussians.
    """
    means = torch.randn(clusters, dim, generator=generator)
    cluster = (torch.arange(points) % clusters).repeat(len(SPLITS))
    z = torch.randn(len(cluster), dim, generator=generator)
    if not identity:
        roots = torch.randn(clusters, dim, dim, generator=generator) / dim**0.5
        z = torch.einsum("nij,nj->ni", roots[cluster], z)
    return means[cluster] + z, cluster


def shuffled(
    generator: torch.Generator, points: int, steps: int, batch_size: int | None, split: str
) -> Tensor:
    """Batches as places in such points, ``(steps, batch_size)``, each without repetition.

    With all points in a batch, batches differ by their order alone.
    """
    check_split(split)
    order = torch.rand(steps, points, generator=generator).argsort(1)
    return order[:, :batch_size] + SPLITS.index(split) * points


def balanced_labels(generator: torch.Generator, clusters: int, classes: int) -> Tensor:
    """A random label for each cluster, ``(clusters,)``; no label is left out."""
    free = torch.randint(classes, (clusters - classes,), generator=generator)
    labels = torch.cat([torch.arange(classes), free])
    return labels[torch.randperm(clusters, generator=generator)]


def check_numbers(batch_size: int | None, weight_decay: float = 0.0, **counts: int) -> None:
    """Raises a ValueError for a count below 1, a batch that is no part of the points, ..."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if batch_size is not None and not 1 <= batch_size <= counts["points"]:
        raise ValueError(
            f"batch_size must be between 1 and the number of points, {counts['points']}, "
            f"got {batch_size}; None for all of them"
        )
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be 0 or above, and finite, got {weight_decay}")
