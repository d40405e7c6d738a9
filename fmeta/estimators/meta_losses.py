"""Meta-losses: what of a training counts, under one name for every estimator.

A meta-loss gives each step its part; the estimator takes the mean over steps. Those of this module
go as ``meta_loss=`` into estimators of pieces of trainings, which call them with losses, evaluation
losses, ``t`` and ``horizon`` of the piece's steps, and into `fmeta.estimators.full` and others of
whole trainings, which call them with a `Run`. Over a whole training the two are equal.

The loss of a step is the evaluation loss after it where the estimator has an ``eval_split``, else
the training loss before it; ``of=`` puts another meta-loss (or a function of your own of the four)
in its place: ``final(of=log_ratio(2.3, of=validation()))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta._functions import check_function
from fmeta._numbers import check_real
from fmeta._unroll import Run
from fmeta.estimators._contract import MetaLoss, last_loss

__all__ = ["final", "log_ratio", "mean", "sum", "training", "validation", "weighted"]

ByStep = Tensor | Sequence[float]


class _Seen(NamedTuple):
    """Steps: losses ``(*steps)``, the rest broadcasts to them; config of a task or ``by_step``."""

    losses: Tensor
    evals: Tensor | None
    t: Tensor
    horizon: Tensor
    config: Any
    by_step: bool


@dataclass(frozen=True)
class _StepLoss:
    """A function of `_Seen` in both forms; ``needs`` what estimators give by keyword."""

    part: Callable[[_Seen], Tensor]
    needs: frozenset[str] = frozenset()

    def __call__(
        self,
        losses: Tensor | Run,
        eval_losses: Tensor | None = None,
        t: Tensor | None = None,
        horizon: Tensor | None = None,
        *,
        config: Any = None,
    ) -> Tensor:
        if isinstance(losses, Run):
            run, steps = losses, len(losses.losses)
            evals = run.eval_losses if isinstance(run.eval_losses, Tensor) else None
            t = torch.arange(steps, device=run.losses.device)
            horizon = torch.tensor(steps, device=run.losses.device)
            return self.part(_Seen(run.losses, evals, t, horizon, config, False)).mean()
        if t is None or horizon is None:
            raise TypeError("a meta-loss takes a Run, or losses, eval_losses, t and horizon")
        return self.part(_Seen(losses, eval_losses, t, horizon, config, True))


def mean() -> MetaLoss:
    """Mean of the losses of all steps: the default of all estimators."""
    return _StepLoss(_part_of(None))


def sum(of: MetaLoss | None = None) -> MetaLoss:
    """Sum over the steps of a training: the mean, times its horizon.

    Trainings of several horizons count by their length, where with `mean` each counts alike.
    """
    part = _part_of(of)
    return _StepLoss(lambda seen: part(seen) * seen.horizon, _needs(of))


def final(of: MetaLoss | None = None) -> MetaLoss:
    """Loss of a training's last step alone.

    Without evaluation that is the training loss before the last update. Estimators of pieces see it
    once in a training, so that most of their estimates are 0 for most tasks: they are noisier, and
    `fmeta.estimators.es` and ``truncated`` cut off all but the last truncation's share.
    """
    part = _part_of(of)

    def last(seen: _Seen) -> Tensor:
        return torch.where(seen.t + 1 == seen.horizon, part(seen) * seen.horizon, 0.0)

    return _StepLoss(last, _needs(of))


def weighted(
    weights: ByStep | Callable[[Tensor, Tensor], Tensor], of: MetaLoss | None = None
) -> MetaLoss:
    """Mean over steps of ``w loss``.

    Args:
        weights: ``weights(t, horizon) -> w``, elementwise; or a weight for each t (a sequence or a
            tensor ``(T,)``, on from T the last).
        of: what is weighted.

    Example:
        >>> late = weighted(lambda t, horizon: (t >= 0.8 * horizon) * 5.0)
        >>> losses, t = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5]), torch.arange(5)
        >>> float(late(losses, None, t, torch.tensor(5)).mean())
        0.5
    """
    part, weight = _part_of(of), _by_step("weights", weights)
    return _StepLoss(lambda seen: weight(seen) * part(seen), _needs(of))


def validation(of: MetaLoss | None = None) -> MetaLoss:
    """The evaluation losses count, and an estimator without ``eval_split`` is an error.

    Raises:
        ValueError: at the first estimate, where there are none.
    """
    part = _part_of(of)

    def shown(seen: _Seen) -> Tensor:
        if seen.evals is None:
            raise ValueError(
                "the meta-loss is of evaluation losses, of which there are none: give the "
                'estimator eval_split="validation"'
            )
        return part(seen)

    return _StepLoss(shown, _needs(of))


def training(of: MetaLoss | None = None) -> MetaLoss:
    """The training losses count, also where the estimator evaluates."""
    part = _part_of(of)
    return _StepLoss(lambda seen: part(seen._replace(evals=None)), _needs(of))


def log_ratio(
    baseline: float | ByStep | Callable[[Any], Tensor] = 1.0,
    of: MetaLoss | None = None,
    *,
    floor: float = 1e-30,
) -> MetaLoss:
    """``log(loss / baseline)``: tasks of small and of large losses count alike.

    Args:
        baseline: what a loss is compared with: a positive number; one for each t (a sequence or a
            tensor ``(T,)``, on from T the last), such as a hand-made optimizer's mean curve; or
            ``baseline(config) -> scalar``, for each task its own.
        of: the loss.
        floor: losses below count as this, so that one of 0 has a logarithm.

    Example:
        >>> float(log_ratio(2.0)(torch.tensor([2.0]), None, torch.arange(1), torch.tensor(1)))
        0.0
    """
    part, needs = _part_of(of), _needs(of)
    _check_positive("floor", floor)
    below: Callable[[_Seen], Tensor]
    if callable(baseline):
        check_function("baseline", baseline, "config")
        below, needs = _of_task(baseline), needs | {"config"}
    elif isinstance(baseline, (int, float)):
        below = _number(baseline)
    else:
        below = _by_step("baseline", baseline)
        for value in torch.as_tensor(baseline).tolist():
            _check_positive("baseline", value)
    return _StepLoss(lambda seen: part(seen).clamp(min=floor).log() - below(seen).log(), needs)


def _of_task(baseline: Callable[[Any], Tensor]) -> Callable[[_Seen], Tensor]:
    def of_task(seen: _Seen) -> Tensor:
        if not seen.by_step:
            return baseline(seen.config)
        return torch.vmap(torch.vmap(baseline))(seen.config).unsqueeze(-1)

    return of_task


def _check_positive(name: str, value: float) -> None:
    check_real(**{name: value})
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _number(value: float) -> Callable[[_Seen], Tensor]:
    _check_positive("baseline", value)
    return lambda seen: torch.as_tensor(value, dtype=seen.losses.dtype, device=seen.losses.device)


def _by_step(
    name: str, given: ByStep | Callable[[Tensor, Tensor], Tensor]
) -> Callable[[_Seen], Tensor]:
    if callable(given):
        fn = given
        check_function(name, fn, "t", "horizon")
        return lambda seen: fn(seen.t, seen.horizon)
    try:
        # Numbers in double precision, for losses may be.
        table = given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(
            f"{name} must be a function, or one number for each t, of shape (T,), got {given!r}"
        ) from None
    if table.ndim != 1 or not len(table):
        raise ValueError(
            f"{name} by step must be one number for each t, of shape (T,), got {tuple(table.shape)}"
        )
    if not table.is_meta and not bool(table.isfinite().all()):
        raise ValueError(f"{name} must be finite for each t, got {table.tolist()}")

    def looked_up(seen: _Seen) -> Tensor:
        values = table.to(seen.losses.device, seen.losses.dtype)
        return values[seen.t.clamp(max=len(values) - 1)]

    return looked_up


def _part_of(of: MetaLoss | None) -> Callable[[_Seen], Tensor]:
    if isinstance(of, _StepLoss):
        return of.part
    if of is not None:
        check_function("of", of, "losses", "eval_losses", "t", "horizon")
    fn = of or last_loss
    return lambda seen: fn(seen.losses, seen.evals, seen.t, seen.horizon)


def _needs(of: MetaLoss | None) -> frozenset[str]:
    return of.needs if isinstance(of, _StepLoss) else frozenset()
