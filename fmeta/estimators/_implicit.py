"""The implicit meta-gradient: from where inner training ends, not from the way there."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._autodiff import check_scalar
from fmeta._implicit import check_solver, implicit_gradient
from fmeta._numbers import check_real
from fmeta._unroll import unroll
from fmeta.distributed import Ranks
from fmeta.estimators._arguments import check_arguments, checked_seed
from fmeta.estimators._contract import (
    Bind,
    Estimator,
    InnerLoss,
    bound_pair,
    bound_start,
    check_meta_params,
)
from fmeta.estimators._fresh_tasks import OfOneTask, over_fresh_tasks
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily, extras_of_task, sample_batches, sample_task
from fmeta.tasks._family import device_of_tasks

__all__ = ["implicit"]

Tree = Any

_TOGETHER = 32  # batches whose graph is held at once


def implicit(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int,
    inner_loss: InnerLoss | None = None,
    outer_loss: InnerLoss | None = None,
    proximal: float | None = None,
    bind: Bind | None = None,
    eval_split: str | None = None,
    inner_batches: int | None = None,
    outer_batches: int | None = None,
    solver: str = "cg",
    num_iterations: int = 10,
    damping: float = 0.0,
    step_size: float = 1.0,
    chunk_size: int | None = None,
    ranks: Ranks | None = None,
) -> Estimator:
    r"""Meta-gradient by the implicit function theorem, averaged over freshly drawn tasks by `vmap`.

    The rule trains for ``horizon`` steps without a graph. Its end point p is taken for the optimum
    of the inner problem, the mean of ``inner_loss`` over the batches, plus ``proximal / 2 |p -
    start|^2``; and with the Hessian H of that and :math:`(H + damping) u = \nabla_p outer`

    .. math:: \frac{d\, outer}{dm} = \partial_m outer - \partial_m \langle \nabla_p inner, u \rangle

    is the meta-gradient (`fmeta.implicit_gradient`). Memory grows neither with ``horizon`` nor
    with what the rule keeps (32 batches are looked at together); the solver takes about
    ``num_iterations + 2`` Hessian-vector products on each of ``inner_batches``. It is that of
    `full` as training comes to the optimum, and biased before: it takes what training has not
    done yet for done.

    What can be learned is what moves the optimum: whatever ``inner_loss`` reads of ``meta_params``
    (a weight decay, weights of examples, a loss that is a network) and, with ``proximal``, the
    start. What belongs to the rule (rates, betas) changes only the way to the optimum, and a start
    without ``proximal`` is forgotten there: such meta-parameters are refused by name.

    Args:
        optimizer: the rule that trains; what it has learned is constant.
        family: where the tasks come from; of a `fmeta.tasks.mixture` each family gets its share
            of the tasks.
        num_tasks: tasks an estimate averages over.
        horizon: inner steps T, enough to come near the optimum (see ``"slope"``).
        inner_loss: ``inner_loss(data, config, model_params, batch, meta_params) -> scalar``, what
            training minimises; default the family's loss.
        outer_loss: the same for the end point; default the family's loss, without what
            ``inner_loss`` adds to it.
        proximal: weight lambda of the proximal term; None: none. To learn lambda, write the term
            into ``inner_loss``.
        bind: ``bind(meta_params, config) -> (opt_params, model_params or None)``; says what the
            rule's parameters are, and which start is learned. Default: the rule has none; models
            start by the family, or, where ``proximal`` is all that is given, at ``meta_params``.
        eval_split: the split whose batches the outer loss sees; None: those of training.
        inner_batches: the last so many of training make the inner problem; None: all. Where every
            batch is the whole training set, 1 gives the same for a fraction of the time.
        outer_batches: the last so many are averaged over in the outer loss; None: all T.
        solver, num_iterations, damping, step_size: of `fmeta.implicit_gradient`: ``"cg"``,
            ``"neumann"`` or ``"exact"``.
        chunk_size: tasks that are worked on together, as in `torch.vmap`; None: all.
        ranks: who share the tasks (`fmeta.distributed.joined`); default this process alone.

    Returns:
        An `Estimator`, with the draws, state and metrics of `full`. ``"losses"`` are those that
        training minimises, with the proximal term. Further metrics, ``(tasks,)``: ``"residual"``,
        how far the linear system is from solved, relative to its right side (more iterations or
        damping); ``"slope"``, the norm of the inner problem's gradient at the end point, 0 at an
        optimum (more steps).

    Raises:
        ValueError: neither ``inner_loss`` nor ``proximal``, so that nothing learned moves the
            optimum; an optimizer with parameters of its own and no ``bind``; numbers out of range,
            an unknown solver; an optimizer that needs what the family's ``extras`` do not give;
            fewer tasks than families; later, from ``init``, a meta-parameter that the optimum does
            not depend on, a start of another shape than the family's.
        TypeError: no optimizer, no family, no function (or one of other arguments), no number;
            later, a meta-parameter that is no floating tensor, a seed that is no integer, a state
            of another estimator.

    Example:
        >>> import torch
        >>> import fmeta
        >>> family = fmeta.tasks.quadratic(condition=4.0)
        >>> start = {"x": torch.zeros(10)}
        >>> sgd = fmeta.optimizers.sgd(0.5)
        >>> estimator = implicit(sgd, family, num_tasks=2, horizon=50, proximal=1.0)
        >>> estimate, _ = estimator.estimate(start, estimator.init(start, 0))
        >>> bool(estimate.metrics["slope"].max() < 1e-4)
        True

    Reference:
        Rajeswaran et al., "Meta-learning with implicit gradients" (1909.04630), algorithms 1 and 2
        (proximal); Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
        differentiation" (1911.02590), theorem 1.
    """
    check_arguments(
        optimizer,
        num_tasks=num_tasks,
        horizon=horizon,
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        bind=bind,
        eval_split=eval_split,
        inner_batches=inner_batches,
        outer_batches=outer_batches,
        chunk_size=chunk_size,
        ranks=ranks,
    )
    check_solver(solver, num_iterations, damping, step_size)
    for name, count in (("inner_batches", inner_batches), ("outer_batches", outer_batches)):
        if count is not None and count > horizon:
            raise ValueError(f"{name} is {count}, but training has {horizon}: give at most these")
    if proximal is not None:
        check_real(proximal=proximal)
        if not 0 < proximal < math.inf:
            raise ValueError(f"proximal must be positive and finite, or None, got {proximal}")
    if inner_loss is None and proximal is None:
        raise ValueError(
            "nothing that is learned moves the optimum of the family's own loss: give "
            "inner_loss(data, config, model_params, batch, meta_params) that reads meta_params, or "
            "proximal= to learn the start. The rule's own parameters change only the way there: "
            "learn those by full, forward, truncated or pes"
        )
    if bind is None:
        nothing = optimizer.init()  # of a chain a tuple
        if trees.leaves(nothing):
            raise ValueError(
                "the optimizer has parameters of its own, which are constant here: give them by "
                "bind=lambda meta_params, config: (opt_params, None), with the start that is "
                "learned, if any, in place of None"
            )
        bind = partial(_constant_rule, nothing, inner_loss is None)
    problem = _Problem(inner_loss, outer_loss, proximal, bind)

    def gradient_of(family: TaskFamily) -> Callable[..., OfOneTask]:
        extras = extras_of_task(family, optimizer)

        def gradient(
            meta_params: Tree, config: Tree, params: Tree, batches: Tree, eval_batches: Tree
        ) -> OfOneTask:
            opt_params, start = problem.start(meta_params, config, params)

            def trained(p: Tree, batch: Tree, config: Tree, meta: Tree, start: Tree) -> Tensor:
                return problem.inner(family, config, p, batch, meta) + problem.pull(p, start)

            run = unroll(
                optimizer,
                trained,
                opt_params,
                start,
                batches,
                loss_args=(config, meta_params, start),
                extras=None if extras is None else lambda p, b, config, *_: extras(p, b, config),
            )
            end = optimizer.eval_params(opt_params, run.params, run.hidden)
            inner = _over_last(inner_batches, batches, partial(problem.inner, family, config))
            outer = _over_last(outer_batches, eval_batches, partial(problem.outer, family, config))

            def pull(p: Tree, meta: Tree) -> Tensor:
                return problem.pull(p, problem.start(meta, config, params)[1])

            found = implicit_gradient(
                inner if proximal is None else [*inner, pull],
                outer,
                end,
                meta_params,
                solver=solver,
                num_iterations=num_iterations,
                damping=damping,
                step_size=step_size,
            )
            seen = {"residual": found.residual, "slope": found.slope}
            return OfOneTask(found.grads, found.loss, run.losses, (), seen)

        return gradient

    estimator = over_fresh_tasks(
        gradient_of,
        family,
        num_tasks=num_tasks,
        horizon=horizon,
        eval_split=eval_split,
        chunk_size=chunk_size,
        ranks=ranks,
    )
    families = (family,) if isinstance(family, TaskFamily) else family.families

    def init(meta_params: Tree, seed: int) -> Any:
        check_meta_params(meta_params)
        seed = checked_seed(seed)
        _refuse_what_moves_nothing(problem, families, meta_params, eval_split)
        return estimator.init(meta_params, seed)

    return estimator._replace(init=init)


def _constant_rule(
    opt_params: Tree, learns_start: bool, meta_params: Tree, config: Tree
) -> tuple[Tree, Tree]:
    """The default ``bind`` for an optimizer without parameters."""
    return opt_params, meta_params if learns_start else None


class _Problem:
    """The inner and the outer problem of a task, for one batch."""

    def __init__(
        self,
        inner_loss: InnerLoss | None,
        outer_loss: InnerLoss | None,
        proximal: float | None,
        bind: Bind,
    ) -> None:
        self.losses, self.proximal, self.bind = (inner_loss, outer_loss), proximal, bind

    def inner(self, family: TaskFamily, config: Tree, p: Tree, batch: Tree, meta: Tree) -> Tensor:
        return _loss("inner_loss", self.losses[0], family, config, p, batch, meta)

    def outer(self, family: TaskFamily, config: Tree, p: Tree, batch: Tree, meta: Tree) -> Tensor:
        return _loss("outer_loss", self.losses[1], family, config, p, batch, meta)

    def start(self, meta_params: Tree, config: Tree, drawn: Tree) -> tuple[Tree, Tree]:
        """``(opt_params, model_params)`` with which training begins."""
        opt_params, own = bound_pair(self.bind, meta_params, config)
        return opt_params, drawn if own is None else own

    def pull(self, p: Tree, start: Tree) -> Tensor:
        """The proximal term."""
        if self.proximal is None:
            return trees.leaves(p)[0].new_zeros(())
        apart = trees.leaves(trees.map(lambda a, b: (a - b).square().sum(), p, start))
        return self.proximal / 2 * torch.stack(apart).sum()


def _loss(
    name: str,
    own: InnerLoss | None,
    family: TaskFamily,
    config: Tree,
    p: Tree,
    batch: Tree,
    meta: Tree,
) -> Tensor:
    if own is None:
        return family.loss(family.data, config, p, batch)
    value = own(family.data, config, p, batch, meta)
    check_scalar(value, name)
    return value


def _over_last(
    count: int | None, batches: Tree, loss: Callable[[Tree, Tree, Tree], Tensor]
) -> list[Callable[[Tree, Tree], Tensor]]:
    """The mean of ``loss(params, batch, meta)`` over the last batches, as a sum of functions."""
    steps = len(trees.leaves(batches)[0])
    number = steps if count is None else count
    if number == 1:  # alone: a vmapped convolution is slower
        last = trees.map(lambda x: x[-1], batches)
        return [lambda p, meta: loss(p, last, meta)]

    def part(some: Tree) -> Callable[[Tree, Tree], Tensor]:
        each = torch.vmap(loss, in_dims=(None, 0, None))
        return lambda p, meta: each(p, some, meta).sum() / number

    return [
        part(trees.map(lambda x, i=i: x[i : i + _TOGETHER], batches))
        for i in range(steps - number, steps, _TOGETHER)
    ]


def _refuse_what_moves_nothing(
    problem: _Problem,
    families: tuple[TaskFamily, ...],
    meta_params: Tree,
    eval_split: str | None,
) -> None:
    """Raises a ValueError that names a meta-parameter on which no family's problem depends.

    Plain autograd knows: there is no path in the graph of the inner slope and the outer loss.
    """
    paths = trees.paths(meta_params)
    unseen = set(range(len(paths)))
    for family in families:
        config, params, batches = sample_task(family, 1, 0)
        shown = batches
        if eval_split is not None:
            shown = sample_batches(family, config, 1, 0, split=eval_split)
        device = device_of_tasks(family, meta_params)
        config, params, batch, seen = trees.map(
            lambda x, device=device: x.to(device),
            (config, params, *(trees.map(lambda x: x[0], b) for b in (batches, shown))),
        )
        with torch.enable_grad():
            meta = trees.map(lambda x: x.detach().clone().requires_grad_(), meta_params)
            start = bound_start(problem.bind, meta, config, params)[1]
            p = trees.map(lambda x: x.detach().clone().requires_grad_(), start)
            inner = problem.inner(family, config, p, batch, meta) + problem.pull(p, start)
            slopes = torch.autograd.grad(
                inner, trees.leaves(p), create_graph=True, allow_unused=True
            )
            outer = problem.outer(family, config, p, seen, meta)
            ends = [x for x in (*slopes, outer) if x is not None and x.requires_grad]
            found = torch.autograd.grad(
                [x.sum() for x in ends], trees.leaves(meta), allow_unused=True
            )
        unseen -= {i for i, x in enumerate(found) if x is not None}
    if unseen:
        raise ValueError(
            f"the optimum does not depend on the meta-parameter at path {paths[min(unseen)]}, "
            "whose implicit gradient would always be 0: inner_loss(data, config, model_params, "
            "batch, meta_params) must read it, or, for a start, give proximal=. What belongs to "
            "the rule (rates, betas) changes only the way to the optimum: keep it constant in "
            "`bind`, or learn it by full, forward, truncated or pes"
        )
