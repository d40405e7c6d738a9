"""Parameter trees: every flattening, matching and grouping of leaves in fmeta goes through here.

A tree is a tensor or a dict, tuple, NamedTuple or list of trees. ``None`` is a leaf ("no gradient
here", "not this optimizer's leaf"), never an empty subtree. Dicts are matched by key, so their
insertion order does not matter. Paths are written with ``/``: ``encoder/0.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from fmeta._traced_trees import TracedSpec

__all__ = [
    "cast",
    "common_device",
    "compute_dtype",
    "flatten",
    "flatten_up_to",
    "leaves",
    "map",
    "match",
    "path_string",
    "paths",
    "shape_classes",
    "stack",
    "tensors",
    "unflatten",
]

Tree = Any


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Leaves of a tree (``None`` included) and its structure; dicts in sorted key order."""
    if torch.compiler.is_compiling():
        found: list[Any] = []
        return found, TracedSpec.of(tree, found)
    return optree.tree_flatten(tree, none_is_leaf=True)


def unflatten(spec: Any, leaves: Iterable[Any]) -> Tree:
    """The tree of structure ``spec`` with these leaves."""
    if isinstance(spec, TracedSpec):
        return spec.build(list(leaves), 0)
    return optree.tree_unflatten(spec, list(leaves))


def leaves(tree: Tree) -> list[Any]:
    """Leaves of a tree (``None`` included), dicts in sorted key order."""
    return flatten(tree)[0]


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``fn`` over the leaves of ``tree`` and what stands at the same places in ``rest``."""
    flat, spec = flatten(tree)
    columns = [flatten_up_to(spec, other, tree, f"tree {i + 2}") for i, other in enumerate(rest)]
    return unflatten(spec, [fn(*row) for row in zip(flat, *columns, strict=True)])


def path_string(path: Sequence[Any]) -> str:
    """``("encoder", 0, "weight")`` as ``encoder/0/weight``; the root is ``<root>``."""
    return "/".join(str(part) for part in path) or "<root>"


def paths(tree: Tree) -> list[str]:
    """The path of each leaf, in the order of `flatten`; fields of NamedTuples by their names."""
    if torch.compiler.is_compiling():
        return [path_string(p) for p in flatten(tree)[1].paths()]
    accessors = optree.tree_accessors(tree, none_is_leaf=True)
    return [path_string([_name(entry) for entry in accessor]) for accessor in accessors]


def stack(many: Sequence[Tree]) -> Tree:
    """Trees of one structure and shapes side by side, along a new leading dimension.

    Batches of a data loader become what `fmeta.unroll` takes, tasks what `vmap` takes.

    Example:
        >>> stack([{"x": torch.zeros(3)}, {"x": torch.ones(3)}])["x"].shape
        torch.Size([2, 3])
    """
    if not many:
        raise ValueError("there is nothing to stack")
    return map(lambda *xs: torch.stack(xs), many[0], *many[1:])


def flatten_up_to(spec: Any, tree: Tree, like: Tree, what: str) -> list[Any]:
    """What stands in ``tree`` at each leaf of ``like`` (whose structure is ``spec``).

    Raises:
        ValueError: naming the first path that is missing or superfluous in ``tree``.
    """
    try:
        return spec.flatten_up_to(tree)
    except ValueError:
        raise ValueError(_explain(like, tree, what)) from None


def match(like: Tree, tree: Tree, what: str, *, allow_none: bool = True) -> list[Any]:
    """Leaves of ``tree``, which must be shaped like the parameter tree ``like``.

    Args:
        like: the reference, a tree of tensors (or ``None``).
        tree: a tree of tensors of the same structure and shapes; ``None`` where allowed.
        what: its name in messages ("the gradient").

    Raises:
        ValueError: naming path and shapes of the first leaf that does not match.
    """
    reference, spec = flatten(like)
    found = flatten_up_to(spec, tree, like, what)
    for i, (want, got) in enumerate(zip(reference, found, strict=True)):
        if got is None and allow_none:
            continue
        if want is None and got is None:
            continue
        if not isinstance(got, Tensor):
            raise ValueError(
                f"{what} at path {paths(like)[i]} is {_describe(got)}, not a tensor: give a tree "
                "shaped like the parameters, with None only where there is no gradient"
            )
        if want is not None and got.shape != want.shape:
            raise ValueError(
                f"{what} at path {paths(like)[i]} has shape {tuple(got.shape)}, but the parameter "
                f"there has shape {tuple(want.shape)}: they must be equal"
            )
    return found


def common_device(
    tree: Tree,
    what: str = "the parameters",
    cure: str = "move them to one device, or use `partition` with one optimizer a device",
) -> torch.device | None:
    """The one device of all tensors of a tree (``None`` for a tree without tensors).

    Args:
        tree: any tree.
        what: its name in messages.
        cure: what the message advises.

    Raises:
        ValueError: naming the two paths whose devices differ.
    """
    device = None
    for i, leaf in enumerate(leaves(tree)):
        if not isinstance(leaf, Tensor):
            continue
        if device is None:
            device, first = leaf.device, i
        elif leaf.device != device:
            names = paths(tree)
            raise ValueError(
                f"{what} mix devices: {names[first]} is on {device}, {names[i]} on {leaf.device}: "
                f"{cure}"
            )
    return device


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a parameter is updated: its own, but at least float32."""
    dtype = tensor.dtype
    if dtype is torch.float32 or dtype is torch.float64:
        return dtype
    return torch.promote_types(dtype, torch.float32)


def tensors(tree: Tree) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], Tree]]:
    """The tensors of a tree, and the function that puts others in their places.

    Example:
        >>> found, rebuild = tensors({"a": torch.ones(2), "b": (3, None)})
        >>> rebuild([x * 2 for x in found])
        {'a': tensor([2., 2.]), 'b': (3, None)}
    """
    flat, spec = flatten(tree)
    constants = [None if isinstance(x, Tensor) else (x,) for x in flat]

    def rebuild(values: Iterable[Tensor]) -> Tree:
        it = iter(values)
        return unflatten(spec, [next(it) if c is None else c[0] for c in constants])

    return [x for x in flat if isinstance(x, Tensor)], rebuild


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """The tree with its floating tensors in ``dtype``; numbers and integer tensors are kept."""
    flat, spec = flatten(tree)
    if all(not isinstance(x, Tensor) or x.dtype is dtype for x in flat):
        return tree
    return unflatten(
        spec,
        [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in flat],
    )


def shape_classes(
    tensors: Sequence[Tensor | None], *, max_numel: int, min_size: int, total: int
) -> list[list[int]]:
    """Groups of indices of tensors that are worth stacking: same shape and dtype, small, many.

    Large tensors stay alone: stacking would copy them, and their arithmetic outweighs the calls.

    Args:
        tensors: leaves; ``None`` ones are in no group.
        max_numel: tensors with more elements are groups of one.
        min_size: a class with fewer tensors than this is split into groups of one.
        total: elements of a group at most (but ``min_size`` tensors are always one).
    """
    classes: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        small = tensor.numel() <= max_numel
        key = (tensor.shape, tensor.dtype) if small else i
        classes.setdefault(key, []).append(i)
    groups: list[list[int]] = []
    for members in classes.values():
        if len(members) < min_size:
            groups += [[i] for i in members]
            continue
        # Of about equal sizes: as few shapes of stacks as possible, none of them small.
        numel = max(1, tensors[members[0]].numel())  # type: ignore[union-attr]
        most = max(min_size, total // numel)
        size = math.ceil(len(members) / math.ceil(len(members) / most))
        groups += [members[i : i + size] for i in range(0, len(members), size)]
    return groups


def _name(entry: Any) -> Any:
    return entry.field if isinstance(entry, optree.NamedTupleEntry) else entry.entry


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _explain(like: Tree, tree: Tree, what: str) -> str:
    want, got = set(paths(like)), set(paths(tree))
    # A deeper tree is fine below a leaf (a dict of states at each parameter).
    missing = sorted(w for w in want if not any(g == w or g.startswith(w + "/") for g in got))
    extra = sorted(g for g in got if not any(g == w or g.startswith(w + "/") for w in want))
    parts = [f"path {p} is missing" for p in missing[:3]]
    parts += [f"path {p} is not in the parameters" for p in extra[:3]]
    detail = "; ".join(parts) or (
        f"its containers are of other types ({type(tree).__name__} for {type(like).__name__}, or "
        "deeper down: list, tuple and dict are not interchangeable)"
    )
    return f"{what} is not shaped like the parameters: {detail}"
