"""Several leaves of one shape updated as one stack, and taken apart again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees

__all__ = ["Columns", "Rows", "Stack", "broadcast", "can_index", "share_no_memory", "under_vmap"]

Tree = Any
State = dict[str, Any]


class Rows:
    """One row of a matrix for each leaf, such as what `treewise` tells it.

    Args:
        matrix: ``(L, *row)``.
        leaves: the index of the leaf that each row belongs to.
    """

    def __init__(self, matrix: Tensor, leaves: Sequence[int]) -> None:
        self.matrix = matrix
        self.at = {leaf: row for row, leaf in enumerate(leaves)}
        self._rows: Sequence[Tensor] | None = None

    def of(self, group: Sequence[int]) -> Tensor:
        """The rows of several leaves, ``(B, *row)``; a view where they stand in a row."""
        at = [self.at[i] for i in group]
        if at == list(range(at[0], at[0] + len(at))):
            return self.matrix.narrow(0, at[0], len(at))
        if can_index(self.matrix):
            return self.matrix.index_select(0, torch.tensor(at))
        return torch.stack([self.rows[j] for j in at])

    def row(self, leaf: int) -> Tensor:
        """The row of one leaf."""
        return self.rows[self.at[leaf]]

    @property
    def rows(self) -> Sequence[Tensor]:
        """All of them."""
        if self._rows is None:
            self._rows = self.matrix.unbind(0)  # fake CUDA tensors refuse an index
        return self._rows


def can_index(x: Tensor) -> bool:
    """Whether rows may be taken by a tensor made of Python numbers.

    On other devices that waits for a copy, transforms on meta tensors refuse it, and a compiled
    step would be compiled for these numbers.
    """
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


class Stack(NamedTuple):
    """What goes into the update of a group of leaves of one shape.

    Attributes:
        params, grads: in the compute dtype, one tensor for all leaves, ``(B, *leaf)``.
        states: dict of each leaf.
        keys: which of its entries the rule sees.
        hypers: name -> a value for each leaf, a list.
        rows: name -> ``(B, *row)``.
    """

    params: Tensor
    grads: Tensor
    states: Sequence[State]
    keys: Sequence[str]
    hypers: Mapping[str, Sequence[Any]]
    rows: Mapping[str, Tensor]


class Columns:
    """Entries of the states of several leaves, each as one stacked tensor.

    Args:
        states: dict of tensors of each leaf.
        keys: the entries.
        own: whether their memory may hold the new ones: then what lies there one after another, as
            it does once a stack was handed out leaf by leaf, is not copied, and changed in place.
        axes: how many axes of size 1 a number of each leaf gets.
    """

    def __init__(
        self, states: Sequence[State], keys: Sequence[str], own: bool, axes: int = 0
    ) -> None:
        self.states, self.keys = states, keys
        self.given: State = {}
        self._kept: set[str] = set()
        for k in keys:
            values = [s[k] for s in states]
            column = _as_one(values) if own else None
            if column is None:
                column = torch.stack(values)
            else:
                self._kept.add(k)
            self.given[k] = column.reshape(-1, *(1,) * axes) if column.ndim == 1 else column
        if not share_no_memory([self.given[k] for k in self._kept]):
            self.given.update({k: self.given[k].clone() for k in self._kept})
            self._kept = set()
        self._taken = {_memory(self.given[k]) for k in self._kept}

    @property
    def in_place(self) -> bool:
        """Whether nothing had to be copied."""
        return len(self._kept) == len(self.keys)

    def spared(self, x: Tensor) -> Tensor:
        """``x``, or a copy if `put` is going to change it."""
        return x.clone() if self._taken and _memory(x) in self._taken else x

    def put(self, new: State) -> Sequence[State]:
        """The state of each leaf, with these columns in the place of the given ones.

        Where the given memory holds all of it, the dicts are the given ones.
        """
        kept = self._kept & new.keys()
        if kept:
            new = {k: x if x is self.given.get(k) else self.spared(x) for k, x in new.items()}
            for k in kept:
                if new[k] is not self.given[k]:
                    self.given[k].copy_(new[k])
            if len(kept) == len(new) == len(self.keys):
                return self.states
        columns: list[Sequence[Tensor]] = []
        for k, x in new.items():
            if k in kept:
                columns.append([s[k] for s in self.states])
                continue
            old = self.states[0].get(k)
            number = old is not None and not old.ndim
            columns.append((x.reshape(-1) if number else x).unbind(0))
        if not columns:
            return [{} for _ in self.states]
        return [dict(zip(new, row, strict=True)) for row in zip(*columns, strict=True)]


def broadcast(
    update: Callable[..., Any],
    theta: Tree,
    x: Stack,
    columns: Columns,
    extra: Mapping[str, Any],
    check: Callable[[Tensor], None],
) -> tuple[Tensor, Sequence[State]]:
    """The update of a stack by a rule that takes stacks as they are.

    Args:
        columns: of the states.
        check: gets each entry of the state, stacked.

    Returns:
        ``(delta, states)``, ``(B, *leaf)`` and a dict for each leaf.
    """
    ones = (1,) * (x.params.ndim - 1)
    for k, column in columns.given.items():
        check(column if x.states[0][k].ndim else column.reshape(-1))
    numbers = {k: _spread(v, x.params, ones) for k, v in x.hypers.items()}
    delta, state = update(
        theta, x.params, x.grads, dict(columns.given), **numbers, **x.rows, **extra
    )
    delta = columns.spared(delta)
    return delta, columns.put(state)


def under_vmap(
    update: Callable[..., Any], theta: Tree, x: Stack, extra: Mapping[str, Any]
) -> tuple[Tensor, Sequence[State]]:
    """The update of a stack by a rule of one tensor.

    Returns:
        ``(delta, states)``.
    """
    shared = {k: v[0] for k, v in x.hypers.items() if all(y is v[0] for y in v)}
    own = {k: _stack_numbers(v, x.params[0]) for k, v in x.hypers.items() if k not in shared}
    seen = [{k: s[k] for k in x.keys} for s in x.states]
    columns = [trees.leaves(s) for s in seen]
    spec = trees.flatten(seen[0])[1]
    stacked = [torch.stack(c) for c in zip(*columns, strict=True)]
    found: list[Any] = []

    def one(p: Tensor, g: Tensor, state: list[Tensor], own: dict[str, Tensor]) -> Any:
        delta, new = update(theta, p, g, trees.unflatten(spec, state), **shared, **own, **extra)
        leaves, new_spec = trees.flatten(new)
        found.append(new_spec)
        return delta, tuple(leaves)

    delta, flat = torch.vmap(one)(x.params, x.grads, stacked, {**own, **x.rows})
    if not flat:  # nothing to take apart: the state is empty
        return delta, [trees.unflatten(found[0], []) for _ in x.states]
    rows = zip(*(y.unbind(0) for y in flat), strict=True)
    return delta, [trees.unflatten(found[0], row) for row in rows]


def _spread(values: Sequence[Any], params: Tensor, ones: tuple[int, ...]) -> Any:
    """A hyper-parameter of several leaves: one number for all, or a column."""
    first = values[0]
    if all(x is first for x in values) and not (isinstance(first, Tensor) and first.ndim):
        return first
    out = _stack_numbers(values, params.select(0, 0))
    return out.reshape(-1, *ones) if out.ndim == 1 else out


def _stack_numbers(values: Sequence[Any], param: Tensor) -> Tensor:
    """One hyper-parameter of several leaves; where some are scalars, they are spread out."""
    tensors = [x if isinstance(x, Tensor) else param.new_tensor(x) for x in values]
    if any(x.shape != tensors[0].shape for x in tensors):
        tensors = [x.expand(param.shape) for x in tensors]
    return torch.stack(tensors)


def _as_one(xs: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one, stacked, if they lie at equal distances in one memory; or None.

    So they do once a stack's new state was handed out leaf by leaf.
    """
    first = xs[0]
    if torch.compiler.is_compiling() or not first.numel() or not _has_memory(first):
        return None
    size, memory = first.element_size(), first.untyped_storage()
    # Without loops of Python: this is asked for every tensor of the state, at every step.
    starts = list(map(Tensor.data_ptr, xs))
    distance, rest = divmod(starts[1] - starts[0], size) if len(xs) > 1 else (first.numel(), 0)
    if rest or distance < 1:
        return None
    if starts != list(range(starts[0], starts[0] + len(xs) * distance * size, distance * size)):
        return None
    shape, strides = first.shape, first.stride()
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    if starts[-1] + last * size > memory.data_ptr() + memory.nbytes():
        return None
    if not _is_injective((len(xs), *shape), (distance, *strides)):
        return None
    if first.is_contiguous():  # which is cheaper to ask for
        alike = all(map(Tensor.is_contiguous, xs))
    else:
        alike = list(map(Tensor.stride, xs)) == [strides] * len(xs)
    if not alike:
        return None
    return first.as_strided((len(xs), *shape), (distance, *strides))


def _has_memory(x: Tensor) -> bool:
    return type(x) is Tensor and x.device.type != "meta"  # none of fake tensors, say


def _is_injective(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether no two elements of such a tensor share memory (it may be False where none do)."""
    reach = 0
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return False
            reach += (n - 1) * stride
    return True


def share_no_memory(xs: Sequence[Tensor]) -> bool:
    """Whether no two of the tensors share memory."""
    spans = []
    for x in xs:
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        spans.append((x.data_ptr(), x.data_ptr() + last * x.element_size()))
    spans.sort()
    return all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
