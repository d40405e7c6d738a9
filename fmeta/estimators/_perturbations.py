"""Which perturbation each step of each training has, and what its loss is multiplied by.

Evolution strategies differ in nothing else. A step's perturbation ``eps`` has a name, integers from
which it is drawn; where the name changes, or another training begins, a new row of the table
begins. ``xi`` is what a step's loss is multiplied by: ``eps`` itself, or the sum of all that the
training has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.estimators._noise import Name, Noise
from fmeta.estimators._plan import Plan

__all__ = ["Perturbations", "Scheme", "perturbations", "relative_losses", "weighted_sums"]

Tree = Any


class Scheme(NamedTuple):
    """How long a perturbation is kept, and whether those of a training are summed.

    Attributes:
        name: ``name(seed, estimate, particle, drawn, t) -> integers`` of the perturbation at step
            ``t`` of the training ``drawn``.
        accumulates: whether ``xi`` is the sum of the perturbations that a training has seen, not
            that of the step alone.
        together: ``"tasks"`` begin and end for themselves, those of a ``"particle"`` together, or
            ``"all"``.
    """

    name: Callable[[int, int, int, Sequence[int], int], Name]
    accumulates: bool
    together: str = "tasks"


class Perturbations(NamedTuple):
    """Perturbations of one truncation.

    Attributes:
        row: which of them each step of each task has, ``(K, tasks)``.
        table: the same in Python.
        task: the task of each, ``(rows,)``; the first rows are those of step 0, in order.
        edges: the steps with which new ones begin.
        eps, xi: like the meta-parameters with leading dimension ``(rows,)``.
    """

    row: Tensor
    table: list[list[int]]
    task: Tensor
    edges: list[int]
    eps: Tree
    xi: Tree


def perturbations(
    meta_params: Tree,
    plan: Plan,
    scheme: Scheme,
    noise: Noise,
    *,
    seed: int,
    step: int,
    each: int,
    before: Tree,
) -> Perturbations:
    """The table of estimate ``step``.

    Args:
        meta_params: what is perturbed.
        plan: of the estimate's trainings.
        scheme, noise: which names, and what they stand for.
        seed, step: of the run and the estimate.
        each: tasks of a particle.
        before: ``xi`` after the estimate before, ``(tasks, ...)``; not looked at unless the
            scheme accumulates.
    """
    is_new, t, drawn = plan.clock
    names: list[Name] = []
    tasks: list[int] = []
    parents: list[int | None] = []  # the row whose sum goes on; None where a training begins
    table: list[list[int]] = []
    for k in range(len(t)):
        now = list(table[-1]) if table else [-1] * len(t[0])
        for i, own in enumerate(drawn[k]):
            name = scheme.name(seed, step, own[2] // each, own, t[k][i])
            if not table or is_new[k][i] or name != names[now[i]]:
                parents.append(None if is_new[k][i] else now[i])
                names.append(name)
                tasks.append(i)
                now[i] = len(names) - 1
        table.append(now)
    edges = [k for k in range(len(table)) if k == 0 or table[k] != table[k - 1]]
    eps = noise.stacked(meta_params, names)
    device = plan.t.device
    found = Perturbations(
        torch.tensor(table, device=device),
        table,
        torch.tensor(tasks, device=device),
        edges,
        eps,
        eps,
    )
    if not scheme.accumulates:
        return found
    # A perturbation counts once, so not again where it is the one that the last step had.
    goes_on = [
        not is_new[0][i]
        and names[i] == scheme.name(seed, step - 1, own[2] // each, own, t[0][i] - 1)
        for i, own in enumerate(drawn[0])
    ]
    begins, kept = (torch.tensor(x, device=device) for x in (is_new[0], goes_on))
    return found._replace(xi=trees.map(_summed(parents, begins, kept), eps, before))


def _summed(
    parents: list[int | None], begins: Tensor, kept: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """``(eps, xi before) -> xi`` of all rows, for one tensor."""

    def xi_of(eps: Tensor, before: Tensor) -> Tensor:
        first = eps[: len(begins)]
        new, same = (x.reshape(-1, *(1,) * (eps.ndim - 1)) for x in (begins, kept))
        rows = list(torch.where(new, first, before + torch.where(same, 0.0, first)).unbind())
        for r in range(len(begins), len(parents)):
            parent = parents[r]
            rows.append(eps[r] if parent is None else rows[parent] + eps[r])
        return torch.stack(rows)

    return xi_of


def relative_losses(values: Tensor, each: int) -> Tensor:
    """What of a step's loss its perturbation answers for, ``(K, tasks)``.

    Args:
        values: ``(K, tasks, 2)`` of opposite perturbations, of which it is half the difference, or
            ``(K, tasks, 1)``: then it is what the loss is above the mean of the other particles'
            (which is independent of this perturbation, so that it adds no bias).
        each: tasks of a particle.
    """
    if values.shape[2] == 2:
        return (values[..., 0] - values[..., 1]) / 2
    losses = values[..., 0]
    sound = losses.isfinite().all(0)
    seen = torch.where(sound, losses, 0.0)
    own, count = (x.unflatten(-1, (-1, each)).sum(-1) for x in (seen, sound.to(seen.dtype)))
    others = (own.sum(-1, keepdim=True) - own) / (count.sum() - count).clamp(min=1)
    return losses - others.repeat_interleave(each, -1)


def weighted_sums(relative: Tensor, found: Perturbations, meta_params: Tree, noise: Noise) -> Tree:
    """Each task's part in the gradient, ``(tasks, ...)``: of ``relative xi / std^2`` the mean.

    Args:
        relative: ``(K, tasks)``, of `relative_losses`.
        found: of `perturbations`.
        meta_params, noise: what was perturbed, and how.
    """
    steps, tasks = relative.shape
    # One scalar for each row first; tensors as large as the meta-parameters come after.
    zeros = relative.new_zeros(len(found.task))
    weights = zeros.index_add(0, found.row.flatten(), relative.flatten() / steps)

    def total(x: Tensor, xi: Tensor) -> Tensor:
        parts = weights.reshape(-1, *(1,) * (xi.ndim - 1)) * xi
        if len(parts) == tasks:  # a row for each task, in order
            return parts.to(x.dtype)
        return parts.new_zeros(tasks, *x.shape).index_add(0, found.task, parts).to(x.dtype)

    return trees.map(total, meta_params, noise.over_variance(meta_params, found.xi))
