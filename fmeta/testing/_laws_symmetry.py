"""Laws of symmetry: many tasks at once, and coordinates in another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.random import fold_in
from fmeta.testing._case import Case
from fmeta.testing._compare import assert_close
from fmeta.testing._registry import law

__all__ = ["EQUIVARIANCES"]

Tree = Any

EQUIVARIANCES = ("coordinate", "axes")


@law()
def vmap_equals_loop(optimizer: Any, params: Tree, *, tasks: int = 3, **setup: Any) -> None:
    """``vmap`` over tasks (their parameters, gradients, hidden states) equals one after another.

    With one ``opt_params`` for all tasks, and with a copy for each (particles of ES and PES). The
    loss is shared, and so are extras that are no function of the parameters.
    """
    case = Case(optimizer, params, **setup).double()
    rows = [trees.map(lambda p, k=k: p * (1 + 0.1 * k), case.params) for k in range(tasks)]
    rates = [
        trees.map(
            lambda x, k=k: x * (1 + 0.01 * k) if x.is_floating_point() else x, case.opt_params
        )
        for k in range(tasks)
    ]
    grads = [[case.grads(10 * t + k) for k in range(tasks)] for t in range(2)]
    for what, own in (("with shared opt_params", False), ("with opt_params of each task", True)):
        ths = rates if own else [case.opt_params] * tasks
        want = []
        for k in range(tasks):
            p, h = rows[k], case.start(rows[k], ths[k])
            for t in range(2):
                p, h = case.step(p, grads[t][k], h, ths[k])
            want.append((p, h))

        def both(th: Tree, p: Tree, first: Tree, second: Tree) -> tuple[Tree, Tree]:
            h = case.start(p, th)
            for g in (first, second):
                p, h = case.step(p, g, h, th)
            return p, h

        th, dim = (_stacked(rates), 0) if own else (case.opt_params, None)
        got = torch.vmap(both, in_dims=(dim, 0, 0, 0))(th, *map(_stacked, (rows, *grads)))
        for k in range(tasks):
            where = f"of task {k} under vmap {what}, beside the loop"
            p, h = trees.map(lambda x, k=k: x[k], got)
            assert_close(p, want[k][0], "params", where)
            assert_close(h, want[k][1], "hidden", where)


@law()
def permutation_equivariant(
    optimizer: Any, params: Tree, *, equivariance: str, steps: int = 3, **setup: Any
) -> None:
    """Permuting what belongs to the coordinates of a leaf permutes its updates, and no more.

    Args:
        optimizer, params, **setup: as for every law.
        equivariance: ``"coordinate"``: any permutation of a leaf's coordinates, what a rule that
            treats all of them alike obeys. ``"axes"``: only permutations of the indices along each
            axis (rows, columns, channels), for rules that know a tensor's axes (norms and factored
            moments over rows and columns, orthogonalisation); it follows from the first and is
            weaker. Each leaf gets permutations of its own; opt_params stay as they are.
        steps: how many steps are compared.
    """
    if equivariance not in EQUIVARIANCES:
        raise ValueError(f"equivariance must be one of {EQUIVARIANCES}, got {equivariance!r}")
    case = Case(optimizer, params, **setup).double()
    shuffles = [
        _shuffle(x.shape, equivariance, fold_in(case.seed, 3, i))
        for i, x in enumerate(trees.leaves(case.params))
    ]

    def shuffled(tree: Tree) -> Tree:
        flat, spec = trees.flatten(tree)
        return trees.unflatten(spec, [f(x) for f, x in zip(shuffles, flat, strict=True)])

    p, q = case.params, shuffled(case.params)
    h, k = case.start(p), case.start(q)
    for t in range(steps):
        grads = case.grads(t)
        p, h = case.step(p, grads, h)
        q, k = case.step(q, shuffled(grads), k)
        what = "coordinates permuted" if equivariance == "coordinate" else "axes permuted"
        assert_close(
            q, shuffled(p), "params", f"after step {t + 1} with {what}, beside the permuted result"
        )


def _shuffle(
    shape: Sequence[int], equivariance: str, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    if equivariance == "coordinate":
        size = torch.Size(shape).numel()
        order = torch.randperm(size, generator=generator)
        return lambda x: x.reshape(-1)[order.to(x.device)].reshape(x.shape)
    orders = [torch.randperm(n, generator=generator) for n in shape]

    def along_axes(x: Tensor) -> Tensor:
        for axis, order in enumerate(orders):
            x = x.index_select(axis, order.to(x.device))
        return x

    return along_axes


def _stacked(rows: Sequence[Tree]) -> Tree:
    return trees.map(lambda *xs: torch.stack(xs), *rows)
