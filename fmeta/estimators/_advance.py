"""Several steps of many inner trainings: replayed, or unrolled to be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._autodiff import inside_transform
from fmeta._inner_step import InnerState, inner_step
from fmeta._memory import keep_freed_memory
from fmeta._trace import Traced
from fmeta._trace_gradient import TracedWithGradient
from fmeta._unroll import unroll
from fmeta.optimizer import Optimizer
from fmeta.optimizers._member_networks import undifferentiated
from fmeta.tasks import TaskFamily, extras_of_task, loss_of_task

__all__ = ["Advance", "by_steps", "by_unroll"]

Tree = Any
# advance(opt_params, params, hidden, config, batches, eval_batches) -> (params, hidden, losses,
# eval_losses or None): some steps of all members; batches and losses are (steps, members, ...).
Advance = Callable[..., tuple[Tree, Tree, Tensor, Tensor | None]]


def by_steps(
    optimizer: Optimizer,
    family: TaskFamily,
    *,
    evaluate: bool,
    chunk_size: int | None = None,
    trace: bool = False,
    compile: bool = False,
    first_order: bool | str = False,
    differentiated: bool = False,
) -> Advance:
    """Step after step; with ``trace`` recorded once and replayed, ``differentiated`` or not.

    A chunk of members makes all steps before the next one begins, so that what it works on stays
    in the cache.
    """
    keep_freed_memory()
    loss_fn = loss_of_task(family)
    extras = extras_of_task(family, optimizer)
    inner = inner_step(optimizer, loss_fn, first_order=first_order)

    def one(
        opt_params: Tree, params: Tree, hidden: Tree, config: Tree, batch: Tree, shown: Tree
    ) -> tuple[Tree, Tree, Tensor, Any]:
        state, metrics = inner(
            opt_params, InnerState(params, hidden), batch, loss_args=(config,), extras=extras
        )
        if not evaluate:
            return state.params, state.hidden, metrics["loss"], ()
        seen = optimizer.eval_params(opt_params, state.params, state.hidden)
        return state.params, state.hidden, metrics["loss"], loss_fn(seen, shown, config)

    vmapped = torch.vmap(one)

    def step(*args: Tree) -> tuple[Tree, Tree, Tensor, Any]:
        constant = not (differentiated or torch.is_grad_enabled() or inside_transform())
        with undifferentiated(constant):
            if len(trees.leaves(args[1])[0]) > 1:
                return vmapped(*args)
            # Alone: for models that `vmap` cannot run.
            return trees.map(lambda x: x[None], one(*trees.map(lambda x: x[0], args)))

    if trace or compile:
        # Of opt_params, params and hidden.
        step = (
            TracedWithGradient(step, 3, compile=compile)
            if differentiated
            else Traced(step, compile=compile, written_out=True, carried=(1, 3))
        )

    def advance_chunk(
        opt_params: Tree, params: Tree, hidden: Tree, config: Tree, batches: Tree, shown: Tree
    ) -> tuple[Tree, Tree, Tensor, Any]:
        losses, evals = [], []
        for k in range(len(trees.leaves(batches)[0])):
            batch, seen = (trees.map(lambda x, k=k: x[k], b) for b in (batches, shown))
            params, hidden, loss, value = step(opt_params, params, hidden, config, batch, seen)
            losses.append(loss)
            evals.append(value)
        return params, hidden, torch.stack(losses), torch.stack(evals) if evaluate else ()

    def advance(*args: Tree) -> tuple[Tree, Tree, Tensor, Tensor | None]:
        members = len(trees.leaves(args[1])[0])
        size = chunk_size or members
        found = [
            # Batches are by step, then by member; the rest by member.
            advance_chunk(*_part(args[:4], 0, i, size), *_part(args[4:], 1, i, size))
            for i in range(0, members, size)
        ]
        params, hidden, *losses = (
            trees.map(lambda *xs, dim=dim: torch.cat(xs, dim), *parts)
            for parts, dim in zip(zip(*found, strict=True), (0, 0, 1, 1), strict=True)
        )
        return params, hidden, losses[0], losses[1] if evaluate else None

    return advance


def _part(tree: Tree, dim: int, start: int, size: int) -> Tree:
    return trees.map(lambda x: x.narrow(dim, start, min(size, x.shape[dim] - start)), tree)


def by_unroll(
    optimizer: Optimizer,
    family: TaskFamily,
    *,
    evaluate: bool,
    chunk_size: int | None = None,
    **options: Any,
) -> Advance:
    """`fmeta.unroll` with these options, which can be differentiated."""
    keep_freed_memory()
    loss_fn = loss_of_task(family)
    extras = extras_of_task(family, optimizer)

    def one(
        opt_params: Tree, params: Tree, hidden: Tree, config: Tree, batches: Tree, shown: Tree
    ) -> tuple[Tree, Tree, Tensor, Any]:
        run = unroll(
            optimizer,
            loss_fn,
            opt_params,
            params,
            batches,
            loss_args=(config,),
            hidden=hidden,
            extras=extras,
            eval_batches=shown if evaluate else None,
            **options,
        )
        return run.params, run.hidden, run.losses, run.eval_losses

    several = torch.vmap(
        one, in_dims=(0, 0, 0, 0, 1, 1), out_dims=(0, 0, 1, 1), chunk_size=chunk_size
    )

    def advance(*args: Tree) -> tuple[Tree, Tree, Tensor, Tensor | None]:
        params, hidden, losses, evals = several(*args)
        return params, hidden, losses, evals if evaluate else None

    return advance
