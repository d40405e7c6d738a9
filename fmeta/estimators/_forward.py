"""Forward mode: the exact meta-gradient of long trainings, for few meta-parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fmeta._numbers import is_whole
from fmeta.distributed import Ranks
from fmeta.estimators._contract import Bind, Estimator, InnerLoss, check_sizes
from fmeta.estimators._forward_online import online
from fmeta.estimators._full import over_whole_trainings
from fmeta.estimators._pushed import basis, by_leaf, check_few, pushed
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily

__all__ = ["forward"]

Tree = Any


def forward(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int | Sequence[int],
    truncation: int | None = None,
    bind: Bind | None = None,
    inner_loss: InnerLoss | None = None,
    meta_loss: Callable[..., Tensor] | None = None,
    eval_split: str | None = None,
    stagger: bool = True,
    first_order: bool | str = False,
    chunk_size: int | None = None,
    max_elements: int = 1000,
    ranks: Ranks | None = None,
) -> Estimator:
    """Meta-gradient by forward-mode differentiation, in memory that does not grow with the horizon.

    With n elements of meta-parameters theta, training carries the n derivatives ``d params / d
    theta_j`` and ``d hidden / d theta_j`` along, side by side, and keeps nothing of a step that is
    made. An estimate costs about ``1 + n`` times the time of training and the memory of n copies
    of parameters and hidden state: the thing for a learning rate, betas, a weight decay, a
    schedule of ten numbers, over thousands of steps. Gradients are those of `full`, up to rounding.

    With ``truncation=K`` an estimate makes K steps of trainings that go on (real-time recurrent
    learning), and the derivatives stay in the state. Nothing is cut off as it is in `truncated`:
    at fixed meta-parameters the estimates of a training add up to its exact gradient. While
    meta-parameters change, the derivatives carried along are those at the values they had.

    Args:
        optimizer: the rule being learned, or the one under which something else is.
        family: where the tasks come from; of a `fmeta.tasks.mixture` each family gets its share
            of the tasks.
        num_tasks: tasks an estimate averages over.
        horizon: inner steps T; with ``truncation`` also several numbers of which each training
            gets one.
        truncation: inner steps of an estimate; None: whole trainings.
        bind: ``bind(meta_params, config) -> (opt_params, model_params or None)``; as in `full`.
        inner_loss: as in `full`; of whole trainings only.
        meta_loss: that of `full`, of a ``run``; with ``truncation`` that of `truncated`,
            ``meta_loss(losses, eval_losses, t, horizon)``.
        eval_split: the split from which a batch is evaluated after each inner step; None: none.
        stagger: as in `truncated`; of ``truncation`` only.
        first_order: as in `fmeta.unroll`.
        chunk_size: tasks that are worked on together, as in `torch.vmap`; None: all.
        max_elements: of meta-parameters; more are refused.
        ranks: who share the tasks (`fmeta.distributed.joined`); default this process alone.

    Returns:
        An `Estimator`, with the draws, state and metrics of `full`; with ``truncation`` with those
        of `truncated`, whose state also has ``tangents`` ``(elements, tasks, 1, ...)``.

    Raises:
        ValueError: numbers below 1; an optimizer that needs what the family's ``extras`` do not
            give; fewer tasks than families; ``inner_loss`` with ``truncation``; later, more
            meta-parameters than ``max_elements``, an operation without a forward-mode derivative,
            and what `full` or `truncated` refuse.
        TypeError: as `full`.

    Example:
        >>> import fmeta
        >>> rule = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.1)
        >>> estimator = forward(rule, fmeta.tasks.quadratic(), num_tasks=2, horizon=50)
        >>> estimate, _ = estimator.estimate(rule.init(), estimator.init(rule.init(), 0))
        >>> estimate.grads["lr"] < 0
        tensor(True)

    Reference:
        Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization"
        (1703.01785), algorithm 2 and section 3.3.
    """
    check_sizes(max_elements=max_elements, truncation=truncation)
    if truncation is not None:
        if inner_loss is not None:
            raise ValueError("inner_loss goes with whole trainings: leave out truncation")
        few = online(
            optimizer,
            family,
            num_tasks=num_tasks,
            horizon=horizon,
            truncation=truncation,
            bind=bind,
            meta_loss=meta_loss,
            eval_split=eval_split,
            stagger=stagger,
            chunk_size=chunk_size,
            ranks=ranks,
            first_order=first_order,
        )
    elif not is_whole(horizon):
        raise ValueError(
            f"a horizon of {horizon!r} is not one number of steps: several, or a schedule, need "
            "truncation=K"
        )
    else:
        few = over_whole_trainings(
            _gradient,
            optimizer,
            family,
            num_tasks=num_tasks,
            horizon=horizon,
            bind=bind,
            inner_loss=inner_loss,
            meta_loss=meta_loss,
            eval_split=eval_split,
            chunk_size=chunk_size,
            ranks=ranks,
            first_order=first_order,
        )

    def init(meta_params: Tree, seed: int) -> Any:
        check_few(meta_params, max_elements)
        return few.init(meta_params, seed)

    def estimate(meta_params: Tree, state: Any) -> Any:
        check_few(meta_params, max_elements)
        return few.estimate(meta_params, state)

    return few._replace(init=init, estimate=estimate)


def _gradient(
    one: Callable[..., tuple[Tensor, Any]], meta_params: Tree, *args: Tree
) -> tuple[Tree, tuple[Tensor, Any]]:
    """As `fmeta._autodiff.grad_and_value`, by one derivative for each element of the first tree."""
    value, slopes, aux = pushed(one, (meta_params,), (basis(meta_params),), args)
    return by_leaf(slopes, meta_params), (value, aux)
