"""Hypothesis strategies: parameter trees, gradients for them, numbers of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.random import fold_in

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "the strategies of fmeta.testing need hypothesis: pip install 'fmeta[test]'"
    ) from error

__all__ = ["gradients", "param_trees", "shapes", "step_counts"]

Tree = Any

KINDS = ("normal", "zero", "tiny", "huge", "none")

# Plain names, names of nn.Module, and such as confuse who splits or sorts paths.
_KEYS = ("w", "b", "0.weight", "0.bias", "10", "9", "a/b", "Z", "_", "größe")


class Pair(NamedTuple):
    """A NamedTuple node of `param_trees`."""

    first: Any
    second: Any


def shapes(max_ndim: int = 4, max_side: int = 3, *, empty: bool = True) -> st.SearchStrategy[Any]:
    """Shapes of parameters, from ``()`` and (with ``empty``) ``(0,)`` to four dimensions."""
    sides = st.integers(1, max_side)
    proper = st.lists(sides, min_size=0, max_size=max_ndim).map(tuple)
    return proper | st.just((0,)) if empty else proper


def param_trees(
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    max_leaves: int = 6,
    max_numel: int = 40,
    empty: bool = True,
) -> st.SearchStrategy[Tree]:
    """Trees of floating tensors: nested dicts, tuples, lists and NamedTuples, at least one leaf.

    Args:
        dtypes: each leaf has one of these.
        max_leaves: about the most leaves.
        max_numel: the most elements of a leaf.
        empty: whether leaves without elements occur.

    Returns:
        A strategy; values are normally distributed, so that shrinking acts on structure and shapes.
    """

    def draw(shape: Any, dtype: torch.dtype, seed: int) -> Tensor:
        x = torch.randn(shape, generator=fold_in(seed, *shape), dtype=torch.float64)
        return x.to(dtype)

    leaf = st.builds(
        draw,
        shapes(empty=empty).filter(lambda s: math.prod(s) <= max_numel),
        st.sampled_from(list(dtypes)),
        st.integers(0, 2**31),
    )

    def node(children: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        some = st.lists(children, min_size=1, max_size=4)
        return (
            st.dictionaries(st.sampled_from(_KEYS), children, min_size=1, max_size=4)
            | some
            | some.map(tuple)
            | st.builds(Pair, children, children)
        )

    return node(st.recursive(leaf, node, max_leaves=max_leaves))


def gradients(
    params: Tree, kinds: Sequence[str] = KINDS, *, seed: int = 0
) -> st.SearchStrategy[Tree]:
    """Gradients for a parameter tree, each leaf of one of some kinds.

    Args:
        params: tree of floating tensors.
        kinds: of ``"normal"``, ``"zero"``, ``"tiny"`` (about 1e-30), ``"huge"`` (about 1e8) and
            ``"none"`` (None: no gradient).
        seed: of the normal numbers.

    Raises:
        ValueError: for an unknown kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r} of gradient: choose of {', '.join(KINDS)}")
    flat, spec = trees.flatten(params)
    scales = {"normal": 1.0, "zero": 0.0, "tiny": 1e-30, "huge": 1e8}

    def build(chosen: list[str], seed: int) -> Tree:
        found: list[Tensor | None] = []
        for i, (kind, p) in enumerate(zip(chosen, flat, strict=True)):
            if kind == "none":
                found.append(None)
                continue
            x = torch.randn(p.shape, generator=fold_in(seed, i), dtype=torch.float64)
            found.append((scales[kind] * x).to(p.device, p.dtype))
        return trees.unflatten(spec, found)

    each = st.lists(st.sampled_from(list(kinds)), min_size=len(flat), max_size=len(flat))
    return st.builds(build, each, st.integers(seed, seed + 2**31))


def step_counts(max_steps: int = 5) -> st.SearchStrategy[int]:
    """Numbers of steps, from 1."""
    return st.integers(1, max_steps)
