"""Where episodes come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._contract import Episode, Examples
from fmeta.fewshot._labels import check_labels
from fmeta.random import fold_in
from fmeta.tasks import stack_tasks
from fmeta.tasks._family import SPLITS, check_split

__all__ = ["Source", "draw", "from_classes", "likeness"]


class Source(NamedTuple):
    """Episodes of one shape, drawn on the CPU.

    Attributes:
        sample: ``sample(generator, split="train") -> Episode``; classes of different splits have
            nothing in common.
        ways: classes of an episode; 0 in regression.
        shots: support examples of a class (in regression: of an episode).
        queries: query examples, likewise.
        shape: of one input.
        name: for tables and figures.
        classes: how many there are, by split; of waves none are counted.
    """

    sample: Callable[..., Episode]
    ways: int
    shots: int
    queries: int
    shape: tuple[int, ...]
    name: str = "episodes"
    classes: Mapping[str, int] = MappingProxyType({})


def draw(
    source: Source,
    drawn: Sequence[Sequence[int]],
    *,
    split: str = "train",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Episode:
    """A meta-batch: one episode for each row of integers, stacked.

    Args:
        source: of episodes.
        drawn: rows ``(seed, *ints)``; an episode is a function of its row and the split alone.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        device: where they are moved to; None: they stay on the CPU.
        dtype: of inputs and targets that are floating; None: as the source makes them.

    Raises:
        ValueError: an unknown split; labels outside of 0 to the source's ``ways`` - 1.
    """
    check_split(split)
    each = [source.sample(fold_in(*row, SPLITS.index(split)), split) for row in drawn]
    stacked: Episode = stack_tasks(each)
    for what, (_, y) in zip(("support", "query"), stacked[:2], strict=True):
        if source.ways and not y.is_floating_point():  # before they are on a device that is far
            check_labels(y, source.ways, f"the {what} sets of {source.name}")
    if device is not None:
        stacked = trees.map(lambda x: x.to(device), stacked)
    return stacked if dtype is None else trees.cast(stacked, dtype)


def likeness(meta_params: Any) -> dict[str, Any]:
    """Where and in which dtype a learner with these meta-parameters wants its episodes.

    Options of `draw`; the dtype is None where the parameters of the network have several.
    """
    leaves = trees.tensors(meta_params)[0]
    if not leaves:
        return {}
    network = meta_params.get("model_params", ()) if isinstance(meta_params, Mapping) else ()
    dtypes = {x.dtype for x in trees.tensors(network)[0] or leaves if x.is_floating_point()}
    return {"device": leaves[0].device, "dtype": dtypes.pop() if len(dtypes) == 1 else None}


def from_classes(
    images: dict[str, Tensor],
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    name: str = "classes",
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> Source:
    """Classification episodes from images by class: ways, instances and their order are drawn.

    Args:
        images: by split, ``(classes, instances, *shape)``, of any dtype.
        ways: classes of an episode.
        shots: support examples of a class.
        queries: query examples of a class.
        name: of the source.
        prepare: ``prepare(images) -> inputs`` of those that were drawn; default: bytes become
            numbers from 0 to 1.

    Returns:
        A `Source`. Labels are 0 to ``ways`` - 1, by the order in which the classes were drawn;
        examples are in mixed order.

    Raises:
        TypeError: ``images`` that are not tensors by split.
        ValueError: numbers that are no integers above 0, unknown splits, splits of different
            shapes, fewer classes than ways, or fewer instances than are needed.
    """
    check_sizes(ways=ways, shots=shots, queries=queries)
    _check_images(images)
    for split, x in images.items():
        if len(x) < ways:
            raise ValueError(f"split {split} has {len(x)} classes, too few for {ways} ways")
        if x.shape[1] < shots + queries:
            raise ValueError(
                f"split {split} has {x.shape[1]} images of a class, too few for {shots} shots and "
                f"{queries} queries: take fewer of these"
            )
    prepare = prepare or _unit
    shape = tuple(prepare(next(iter(images.values()))[:1, 0]).shape[1:])

    def sample(generator: torch.Generator, split: str = "train") -> Episode:
        if split not in images:
            raise ValueError(f"{name} has no split {split!r}: there are {', '.join(images)}")
        x = images[split]
        classes = torch.randperm(len(x), generator=generator)[:ways]
        needed = shots + queries
        places = torch.stack(
            [torch.randperm(x.shape[1], generator=generator)[:needed] for _ in range(ways)]
        )
        found = x[classes[:, None], places]
        labels = torch.arange(ways)[:, None].expand(ways, needed)

        def part(start: int, stop: int) -> Examples:
            order = torch.randperm(ways * (stop - start), generator=generator)
            return Examples(
                prepare(found[:, start:stop].flatten(0, 1)[order]),
                labels[:, start:stop].flatten()[order],
            )

        return Episode(part(0, shots), part(shots, needed), classes)

    counts = {split: len(x) for split, x in images.items()}
    return Source(sample, ways, shots, queries, shape, name, counts)


def _check_images(images: Any) -> None:
    if not isinstance(images, Mapping) or not images:
        raise TypeError(
            "images must be tensors by split, {'train': images, 'test': images}, got "
            + ("none" if isinstance(images, Mapping) else f"a {type(images).__name__}")
        )
    for split, x in images.items():
        check_split(split)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"images of split {split} must be a tensor, got a {type(x).__name__}: arrays of "
                "NumPy become one by torch.from_numpy"
            )
        if x.ndim < 2:
            raise ValueError(
                f"images of split {split} must be (classes, instances, *shape), got shape "
                f"{tuple(x.shape)}"
            )
    shapes = {split: tuple(x.shape[2:]) for split, x in images.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{split} {shape}" for split, shape in shapes.items())
        raise ValueError(f"images of all splits must have one shape, got {listed}")


def _unit(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.float() / 255
