"""Updates worked off in recomputed chunks, so that one step's graph holds a chunk at a time.

An update that can be worked off so carries a mark: a function of the number of coordinates that
gives its other form (as the marks of `fmeta._leafwise`). The lifts set it; `fmeta.chunked` reads
it. Small leaves are taken together in bins, each of them recomputed; a leaf larger than a bin is
the business of its rule, which knows what it may cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import _guard, trees
from fmeta._autodiff import inside_transform
from fmeta._leafwise import leafwise
from fmeta._leaves import Leaves
from fmeta._remat import remat
from fmeta.optimizer import Hidden, check_needs

__all__ = ["binned", "chunkable", "chunks_of_elements", "form_in_chunks", "is_observed", "pieces"]

Tree = Any
Update = Callable[..., tuple[Any, Any]]

_MARK = "in_chunks"
_CURE = (
    "make a hyper-parameter learnable with `fmeta.learn`, and give what a rule of your own reads "
    "through `opt_params` or `extras`"
)


def chunkable(update: Update, form: Callable[[int], Update]) -> None:
    """Says that ``form(coordinates)`` does what ``update`` does, in recomputed chunks."""
    setattr(update, _MARK, form)


def form_in_chunks(optimizer: Any) -> Callable[[int], Update] | None:
    """What `chunkable` said of this optimizer's update, or None."""
    return getattr(optimizer.update, _MARK, None)


def is_observed() -> bool:
    """Whether anything may be recording, so that recomputing saves memory at all."""
    return torch.is_grad_enabled() or inside_transform()


def binned(
    advance: Update,
    coordinates: int,
    *,
    hypers: Callable[[Tree], Mapping[str, Any]] | None = None,
    needs: frozenset[str] = frozenset(),
    splits_leaves: bool = False,
) -> Update:
    """The update ``advance``, one bin of leaves after another, each bin recomputed.

    Args:
        advance: an update that treats leaves apart, and takes ``hypers=`` if there are any; leaves
            that are None are not its business.
        coordinates: of a bin at most; a larger leaf is alone in its own.
        hypers: as in `lift`. Their values go in as arguments: they may be traced.
        needs: as in `Optimizer`.
        splits_leaves: whether ``advance`` cuts and recomputes a large leaf by itself.
    """

    @leafwise
    def update(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Hidden,
        *,
        loss: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> tuple[Tree, Hidden]:
        check_needs(needs, loss, extras)
        at = Leaves(model_params, grads, hidden)
        values = dict(hypers(opt_params)) if hypers else {}
        read = (loss, None if extras is None else dict(extras)) if needs else (None, None)

        def run(theta: Tree, ps: Tree, gs: Tree, states: Tree, values: Any, read: Any) -> Any:
            named = {"hypers": values} if hypers else {}
            new = advance(theta, ps, gs, Hidden(states, {}), loss=read[0], extras=read[1], **named)
            return new[0], new[1].leaves

        def arguments(indices: Sequence[int]) -> tuple[Any, ...]:
            chosen = set(indices)

            def only(flat: Sequence[Any], other: Any) -> Tree:
                return at.tree([x if i in chosen else other for i, x in enumerate(flat)])

            own = {k: _only_at(v, at, only) for k, v in values.items()}
            states = only(at.states, {})
            return opt_params, only(at.params, None), only(at.grads, None), states, own, read

        observed = is_observed()
        if observed and at.active:
            smallest: dict[int, int] = {}
            for i in sorted(at.active, key=lambda i: at.params[i].numel(), reverse=True):
                smallest[at.params[i].ndim] = i
            _guard.refuse_closures_and_noise(run, *arguments(list(smallest.values())), cure=_CURE)
        delta: list[Any] = [None] * len(at.params)
        states = list(at.states)
        for indices in _bins(at, coordinates):
            alone = at.params[indices[0]].numel() > coordinates and splits_leaves
            result = (remat(run) if observed and not alone else run)(*arguments(indices))
            found, new = (trees.flatten_up_to(at.spec, x, model_params, "it") for x in result)
            for i in indices:
                delta[i], states[i] = found[i], new[i]
        return at.tree(delta), Hidden(at.tree(states), hidden.shared)

    return update


def _only_at(value: Any, at: Leaves, only: Callable[..., Tree]) -> Any:
    """A hyper-parameter that is a tree, with what belongs to the leaves of a bin alone."""
    if isinstance(value, (int, float, Tensor)) or value is None:
        return value
    found = trees.flatten_up_to(at.spec, value, at.model_params, "a hyper-parameter (a tree)")
    return only(found, None)


def _bins(at: Leaves, coordinates: int) -> list[list[int]]:
    """Active leaves in their order, at most so many coordinates together, larger ones alone."""
    found: list[list[int]] = []
    left = 0
    for i in at.active:
        n = at.params[i].numel()
        if not found or n > left:
            found.append([])
            left = coordinates
        found[-1].append(i)
        left -= n
    return found


def pieces(n: int, coordinates: int, each: int = 1) -> list[int]:
    """Sizes of the pieces of an axis of n entries that stand for ``each`` coordinates."""
    size = max(1, coordinates // max(each, 1))
    return [min(size, n - start) for start in range(0, n, size)]


def chunks_of_elements(update_leaf: Update, coordinates: int) -> Update:
    """A leaf's update that works element by element, in recomputed pieces of a large leaf."""

    def chunked_leaf(theta: Tree, p: Tensor, g: Tensor, h: Tree, **given: Any) -> Any:
        if p.numel() <= coordinates:
            return update_leaf(theta, p, g, h, **given)
        sizes = pieces(p.numel(), coordinates)

        def cut(tree: Tree) -> list[Tree]:
            flat, spec = trees.flatten(tree)
            columns = [
                x.reshape(-1, *x.shape[p.ndim :]).split(sizes)
                if isinstance(x, Tensor) and x.shape[: p.ndim] == p.shape
                else (x,) * len(sizes)
                for x in flat
            ]
            return [trees.unflatten(spec, row) for row in zip(*columns, strict=True)]

        def run(theta: Tree, p: Tensor, g: Tensor, h: Tree, given: Any) -> Any:
            return update_leaf(theta, p, g, h, **given)

        run = remat(run) if is_observed() else run
        parts = [run(theta, *row) for row in cut((p, g, h, given))]

        def joined(*xs: Any) -> Any:
            x = xs[0]
            if isinstance(x, Tensor) and x.ndim and x.shape[0] == sizes[0]:
                return torch.cat(xs).reshape(*p.shape, *x.shape[1:])
            return x  # of the whole leaf: a count

        return trees.map(joined, *parts)

    return functools.wraps(update_leaf)(chunked_leaf)
