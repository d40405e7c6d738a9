"""Implicit MAML: the meta-gradient from where inner training ends, not from the way there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._implicit import implicit_gradient
from fmeta._unroll import unroll
from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._contract import Episode, Examples, MetaLearner, check_examples
from fmeta.fewshot._gradient_based import Adapted, Inner, gradient_based
from fmeta.fewshot._inner_rule import inner_rule
from fmeta.fewshot._meta_batch import Piece, shown, without_noise
from fmeta.fewshot._parts import with_parts
from fmeta.optimizer import Optimizer

__all__ = ["imaml"]

Tree = Any


def imaml(
    network: Any,
    *,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
    num_steps: int = 10,
    proximal: float = 1.0,
    solver: str = "cg",
    num_iterations: int = 5,
    damping: float = 0.0,
    step_size: float = 0.1,
    **options: Any,
) -> MetaLearner:
    """MAML whose inner problem has a proximal term, differentiated at its solution.

    Inner training minimises the support loss plus ``proximal / 2 |params - start|^2``, by any
    optimizer and in any number of steps; the meta-gradient follows from the optimum by the
    implicit function theorem (`fmeta.implicit_gradient`), in the memory of a few gradients.

    Args:
        network, lr, optimizer: as of `maml`; what the optimizer learns has no meta-gradient here.
        num_steps: inner steps, enough to come near the optimum.
        proximal: weight lambda of the proximal term.
        solver, num_iterations, damping, step_size: of `fmeta.implicit_gradient`.
        **options: of `gradient_based`, but for those that concern a derivative.

    Returns:
        A `MetaLearner`.

    Raises:
        ValueError: ``proximal`` not above 0, options of a derivative, and what `gradient_based`
            refuses.

    Reference:
        Rajeswaran et al., "Meta-learning with implicit gradients" (1909.04630), algorithms 1 and 2.
    """
    if not 0 < proximal < math.inf:
        raise ValueError(f"proximal must be positive and finite, got {proximal}")
    refused = {"first_order", "checkpoint", "mixed_mode", "step_weights"} & set(options)
    if refused:
        raise ValueError(f"imaml takes no derivative of inner steps: leave out {min(refused)}")
    rule = inner_rule(lr, optimizer)
    held: list[Inner] = []

    def near(inner: Inner) -> Any:
        def loss(moving: Tree, batch: Any, fixed: Tree, start: Tree) -> Tensor:
            apart = [(moving[k] - start[k]).square().sum() for k in moving]
            return (
                inner.support_loss(moving, batch, fixed) + proximal / 2 * torch.stack(apart).sum()
            )

        return loss

    def trained(inner: Inner, meta_params: Tree, support: Examples, steps: int) -> Any:
        moving, fixed = inner.parts(meta_params["model_params"])
        return unroll(
            inner.optimizer,
            near(inner),
            meta_params["opt_params"],
            moving,
            inner.batches(*support, steps),
            loss_args=(fixed, moving),
        )

    def adapt(meta_params: Tree, support: Any, *, num_steps: int | None = None) -> Adapted:
        inner = held[0]
        support = check_examples(support, "the support set")
        steps = inner.num_steps if num_steps is None else num_steps
        params = meta_params["model_params"]
        losses = params[next(iter(params))].new_zeros(0)
        if steps:
            check_sizes(num_steps=steps)
            run = trained(inner, meta_params, support, steps)
            params = {k: run.params.get(k, v) for k, v in params.items()}
            losses = run.losses
        stats: Any = ()
        if inner.batch_norm == "support":
            stats = inner.model.apply(params, support.x)[1]
        return Adapted(params, stats, losses)

    def estimate(inner: Inner) -> Piece:
        held.append(inner)

        def piece(meta_params: Tree, episode: Episode, progress: Any) -> Any:
            with torch.no_grad():
                run = trained(inner, meta_params, episode.support, inner.num_steps)
            loss = near(inner)

            def inner_loss(moving: Tree, params: Tree) -> Tensor:
                start, fixed = inner.parts(params)
                return loss(moving, tuple(episode.support), fixed, start)

            def adapted_to(moving: Tree, params: Tree) -> Adapted:
                whole = {k: moving.get(k, v) for k, v in params.items()}
                stats: Any = ()
                if inner.batch_norm == "support":
                    stats = inner.model.apply(whole, episode.support.x)[1]
                return Adapted(whole, stats, run.losses)

            def outer_loss(moving: Tree, params: Tree) -> Tensor:
                return inner.query_loss(adapted_to(moving, params), episode.query)[0]

            params = meta_params["model_params"]
            found = implicit_gradient(
                inner_loss,
                outer_loss,
                run.params,
                params,
                solver=solver,
                num_iterations=num_iterations,
                damping=damping,
                step_size=step_size,
            )
            outputs = inner.predict(adapted_to(run.params, params), episode.query.x)
            still = trees.map(torch.zeros_like, meta_params["opt_params"])
            grads = {"model_params": found.grads, "opt_params": still}
            return grads, (found.loss, shown(run.losses, outputs, episode.query.y))

        return piece

    learner = gradient_based(network, rule, num_steps=num_steps, estimate=estimate, **options)
    return with_parts(learner._replace(adapt=without_noise(adapt)))
