"""The one contract of all estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fmeta import trees
from fmeta._autodiff import check_scalar, is_pulled_back_to
from fmeta._numbers import is_whole
from fmeta.distributed import Ranks
from fmeta.tasks import TaskFamily

__all__ = [
    "Bind",
    "Estimate",
    "Estimator",
    "InnerLoss",
    "MetaLoss",
    "bind_opt_params",
    "bound_pair",
    "bound_start",
    "check_meta_params",
    "check_sizes",
    "last_loss",
    "learned_loss",
    "scored",
]

Bind = Callable[[Any, Any], tuple[Any, Any]]
# (data, config, model_params, batch, meta_params) -> scalar: a family's loss that is learned too.
InnerLoss = Callable[[Any, Any, Any, Any, Any], Tensor]
MetaLoss = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


class Estimate(NamedTuple):
    """A meta-loss, its gradient with respect to the meta-parameters, and what else was seen.

    All are constants in reverse mode: ``loss.backward()`` finds no graph, and `torch.func.grad` of
    an estimate is refused; ``grads`` is that gradient.

    Attributes:
        loss: scalar, over the tasks that did not diverge; NaN when all did.
        grads: like the meta-parameters, over the same tasks.
        metrics: tensors by name. All estimators of fmeta give

            - ``"losses"``: of every inner step before its update;
            - ``"diverged"`` ``(tasks,)``: which tasks had a loss, a meta-loss or a gradient that is
              not finite, and were left out;
            - ``"diverged_at"`` ``(tasks,)``: the inner step of its training (``t`` of a
              ``meta_loss``) at which it first had such a loss or meta-loss; -1 for none, also where
              the gradient alone is not finite;
            - ``"drawn"`` ``(tasks, integers)``: which task i is. Where one estimate has several
              in the same place, it is that of the step which diverged, else the last. With
              ``*drawn[i].tolist()``, `fmeta.tasks.sample_task` gives its config and initial
              parameters again, and, for the number of steps that it made in the estimate in which
              it began (`full`: the horizon), the batches of these. Later batches come from the
              stream of their estimate k: `fmeta.tasks.sample_batches` with ``(seed, k, i, 0)``,
              where ``seed`` is the first of ``drawn`` and i counts the tasks of one family;
            - ``"standard_error"``: the norm of the standard error of ``grads`` over tasks, NaN for
              fewer than two;
            - ``"signal_to_noise"``: the norm of ``grads`` over that;
            - ``"family"`` ``(tasks,)``: for a mixture, which of its families a task is from.
    """

    loss: Tensor
    grads: Any
    metrics: dict[str, Any]


def _same(state: Any) -> Any:
    return state


class Estimator(NamedTuple):
    """Estimates the meta-gradient.

    Attributes:
        init: ``init(meta_params, seed) -> state``, of integers and tensors only.
        estimate: ``estimate(meta_params, state) -> (Estimate, state)``.
        ranks: who makes an estimate together; default this process alone. The estimate is the same
            on all ranks, each has its own part of the state.
        gather: ``gather(state) -> state`` as it would be in one process; the result counts on rank
            0 only.
        scatter: ``scatter(state) -> state``, this rank's part of what `gather` gave.
    """

    init: Callable[[Any, int], Any]
    estimate: Callable[[Any, Any], tuple[Estimate, Any]]
    ranks: Ranks = Ranks.alone()
    gather: Callable[[Any], Any] = _same
    scatter: Callable[[Any], Any] = _same


def bind_opt_params(meta_params: Any, config: Any) -> tuple[Any, Any]:
    """The default ``bind``: the meta-parameters are the optimizer's, models start by the family."""
    return meta_params, None


def bound_pair(bind: Bind, meta_params: Any, config: Any) -> tuple[Any, Any]:
    """``bind(meta_params, config)``, or a ValueError that says what it returned instead."""
    bound = bind(meta_params, config)
    if not isinstance(bound, tuple) or len(bound) != 2:
        raise ValueError(
            f"bind must return (opt_params, model_params or None), got a {type(bound).__name__}"
        )
    return bound


def bound_start(bind: Bind, meta_params: Any, config: Any, drawn: Any) -> tuple[Any, Any]:
    """``(opt_params, model_params)`` with which a training begins.

    Args:
        bind, meta_params, config: as in `bound_pair`.
        drawn: the start of the family, taken where ``bind`` gives None.

    Raises:
        ValueError: a start that is not shaped like the family's, with the path.
    """
    opt_params, own = bound_pair(bind, meta_params, config)
    if own is None:
        return opt_params, drawn
    if trees.leaves(drawn):
        try:
            trees.match(drawn, own, "the start that bind returned", allow_none=False)
        except ValueError as error:
            raise ValueError(
                f"{error} (the parameters here are those of family.init: return all of them, or "
                "None in their place)"
            ) from None
    return opt_params, own


def learned_loss(loss: InnerLoss, family: TaskFamily) -> Callable[..., Tensor]:
    """In the form `fmeta.unroll` takes, with ``loss_args=(config, meta_params)``."""

    def loss_fn(params: Any, batch: Any, config: Any, meta_params: Any) -> Tensor:
        value = loss(family.data, config, params, batch, meta_params)
        check_scalar(value, "inner_loss")
        return value

    return loss_fn


def last_loss(losses: Tensor, evals: Tensor | None, t: Tensor, horizon: Tensor) -> Tensor:
    """The default part of a step in the meta-loss: its evaluation loss, or its training loss."""
    return losses if evals is None else evals


def scored(
    score: MetaLoss,
    losses: Tensor,
    evals: Tensor | None,
    t: Tensor,
    horizon: Tensor,
    config: Callable[[], Any] | None = None,
    *,
    by_step: bool = False,
) -> Tensor:
    """Each step's part in the meta-loss, ``(K, tasks, copies)``.

    Args:
        score: the estimator's ``meta_loss``.
        losses, evals: ``(K, tasks, copies)``.
        t, horizon: ``(K, tasks)``.
        config: gives the config of each step's task, ``(K, tasks, ...)``, to a ``meta_loss`` whose
            attribute ``needs`` has ``"config"``.
        by_step: the step of a value matters, so that one for all steps is refused.
    """
    own = {}
    if "config" in getattr(score, "needs", ()):
        if config is None:
            raise ValueError("this estimator does not give a meta_loss the configs of its tasks")
        own["config"] = config()
    values = score(losses, evals, t.unsqueeze(-1), horizon.unsqueeze(-1), **own)
    if isinstance(values, Tensor):
        if values.shape == losses.shape:
            return values
        if not by_step and _is_of_all(values, losses):
            return values.expand_as(losses)
    got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    cure = ""
    if isinstance(values, Tensor) and values.shape == losses.shape[1:] and not by_step:
        cure = ", and where all steps have the same value keep their dimension, as losses[-1:] does"
    raise ValueError(
        f"meta_loss must return a value for each step, of shape {tuple(losses.shape)} (steps, "
        f"tasks, copies) like losses, got {got}: do not take the mean in it{cure}"
    )


def _is_of_all(values: Tensor, losses: Tensor) -> bool:
    """Whether they are one value for all steps, ``(1, tasks, copies)`` or ``(tasks, copies)``.

    Not what else broadcasts: a mean over copies is the same for all of them, so that there is
    nothing to tell which of them does better. A mean over tasks looks like ``(tasks, copies)``
    where there are as many steps.
    """
    steps, *each = losses.shape
    same = tuple(values.shape)
    return same == (1, *each) or (same == tuple(each) and (steps == 1 or steps != each[0]))


def check_meta_params(meta_params: Any) -> None:
    """Raises a TypeError that names a leaf that is no floating tensor, a ValueError for none.

    And a ValueError for one to which a `torch.func.grad` around the estimate goes back: estimates
    are constants in reverse mode, so that it would find zeros.
    """
    found = trees.leaves(meta_params)
    if not found:
        raise ValueError(
            "meta_params holds no tensor, so there is nothing to learn: give the optimizer's "
            "opt_params (hand-made ones have none but by fmeta.learn), or something of `bind`"
        )
    for i, x in enumerate(found):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"the meta-parameter at path {trees.paths(meta_params)[i]} is {kind}, not a "
                "floating tensor: put what is not learned into `bind`"
            )
        if is_pulled_back_to(x):
            raise ValueError(
                "torch.func.grad or vjp of an estimate, with respect to the meta-parameter at path "
                f"{trees.paths(meta_params)[i]}, would be 0: an estimate is a constant in reverse "
                "mode. Take its `grads`, which are the gradient of its `loss`, or detach the "
                "meta-parameters where a constant is meant"
            )


def check_sizes(**sizes: int | None) -> None:
    """Raises a ValueError for a number that is no integer above 0; None is not looked at."""
    for name, value in sizes.items():
        if value is not None and not is_whole(value):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
