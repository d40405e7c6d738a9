"""Returns-to-go of steps, and baselines for them: what was to be expected before the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["BASELINES", "Baseline", "returns_to_go"]

State = dict[str, Tensor]

_DECAY = 0.9  # of what earlier estimates have told, by an estimate
_RIDGE = 1e-6  # relative to the mean of the diagonal


def returns_to_go(values: Tensor, discount: float, lag: int) -> Tensor:
    """``G_t = sum_{s >= t + lag} discount^(s - t - lag) values_s``.

    Args:
        values: ``(T, ...)``.
        discount: between 0 and 1.
        lag: 1 where the value of a step is settled before it is made, else 0.

    Returns:
        Like ``values``.
    """
    total = torch.zeros_like(values[0])
    found = [total] * lag
    for value in reversed(values[lag:].unbind(0)):
        total = value + discount * total
        found.append(total)
    return torch.stack(found[::-1])


class Baseline(NamedTuple):
    """A baseline as pure functions; none of its values depends on the step that it is for.

    Attributes:
        init: ``init(T) -> state``, of tensors.
        estimate: ``estimate(state, losses, returns) -> (values, state)`` with losses (known before
            each step) and returns ``(T, tasks, rollouts)``, values of the same shape.
    """

    init: Callable[[int], State]
    estimate: Callable[[State, Tensor, Tensor], tuple[Tensor, State]]


def _none() -> Baseline:
    return Baseline(
        lambda steps: {}, lambda state, losses, returns: (torch.zeros_like(returns), state)
    )


def _rollouts() -> Baseline:
    """The mean of the other rollouts of the task."""

    def estimate(state: State, losses: Tensor, returns: Tensor) -> tuple[Tensor, State]:
        return _mean_of_others(returns, 2), state

    return Baseline(lambda steps: {}, estimate)


def _fitted() -> Baseline:
    """The mean of the other rollouts, and a slope times how far the loss is from theirs.

    The slope of each step is by least squares on earlier estimates. A rollout whose loss is above
    that of the others has bad luck behind it, which is no fault of the steps to come.
    """

    def init(steps: int) -> State:
        zeros = torch.zeros(steps, dtype=torch.float64)
        return {"product": zeros, "square": zeros.clone(), "weight": zeros[0].clone()}

    def estimate(state: State, losses: Tensor, returns: Tensor) -> tuple[Tensor, State]:
        state = _on(returns, state)
        expected = _mean_of_others(returns, 2)
        ahead = losses - _mean_of_others(losses, 2)
        # Before the first step all rollouts are alike, but for rounding.
        ridged = state["square"] + _RIDGE * state["square"].mean()
        slope = torch.where(ridged > 0, state["product"] / ridged, 0.0).to(returns.dtype)
        sound = (returns.isfinite() & losses.isfinite()).all(0)
        x, y = (torch.where(sound, x, 0.0).double() for x in (ahead, returns - expected))
        count = sound.sum()
        new = {
            name: (x * z).flatten(1).sum(1) / count for name, z in (("product", y), ("square", x))
        }
        new["weight"] = torch.ones_like(state["weight"])
        return expected + slope[:, None, None] * ahead, _blended(state, new, count)

    return Baseline(init, estimate)


def _moving() -> Baseline:
    """Of each step, the mean over earlier estimates."""

    def init(steps: int) -> State:
        zeros = torch.zeros(steps, dtype=torch.float64)
        return {"mean": zeros, "weight": zeros[0].clone()}

    def estimate(state: State, losses: Tensor, returns: Tensor) -> tuple[Tensor, State]:
        state = _on(returns, state)
        known = (state["mean"] / state["weight"]).to(returns.dtype)[:, None, None]
        values = torch.where(state["weight"] > 0, known, _of_this_estimate(returns))
        kept, count = _finite(returns)
        mean = kept.double().flatten(1).sum(1) / count
        return values, _blended(state, {"mean": mean, "weight": torch.ones_like(mean[0])}, count)

    return Baseline(init, estimate)


def _learned() -> Baseline:
    """A linear function of features of step and loss, by least squares on earlier estimates."""
    size = len(_features(torch.zeros(1, 1, 1)))

    def init(steps: int) -> State:
        gram = torch.zeros(size, size, dtype=torch.float64)
        return {"gram": gram, "moment": gram[0].clone(), "weight": gram[0, 0].clone()}

    def estimate(state: State, losses: Tensor, returns: Tensor) -> tuple[Tensor, State]:
        state = _on(returns, state)
        kept, count = _finite(returns)
        rows = _features(losses.double()).flatten(1)
        rows = torch.where(torch.isfinite(rows) & (returns.isfinite().flatten()), rows, 0.0)
        # Where there is nothing yet, the identity in place of zeros.
        ridge = _RIDGE * state["gram"].diagonal().mean() + (state["weight"] == 0)
        ridged = state["gram"] + ridge * torch.eye(size, dtype=torch.float64, device=rows.device)
        known = torch.linalg.solve(ridged, state["moment"]) @ rows
        known = known.reshape(returns.shape).to(returns.dtype)
        values = torch.where(state["weight"] > 0, known, _of_this_estimate(returns))
        gram = rows @ rows.mT / (count * len(returns))
        moment = rows @ kept.double().flatten() / (count * len(returns))
        new = {"gram": gram, "moment": moment, "weight": torch.ones_like(moment[0])}
        return values, _blended(state, new, count)

    return Baseline(init, estimate)


def _features(losses: Tensor) -> Tensor:
    """``(features, T, tasks, rollouts)``: powers of the time left, times functions of the loss."""
    steps = len(losses)
    left = torch.arange(steps, 0, -1, dtype=losses.dtype, device=losses.device) / steps
    left = left[:, None, None].expand(losses.shape)
    by_left = (torch.ones_like(left), left, left.square())
    # asinh is of the order of a logarithm where losses are huge.
    by_loss = (torch.ones_like(losses), losses, torch.asinh(losses))
    return torch.stack([x * y for x in by_left for y in by_loss])


def _of_this_estimate(returns: Tensor) -> Tensor:
    """Before anything is known, the mean of all other trainings."""
    return _mean_of_others(returns.flatten(1), 1).unflatten(1, returns.shape[1:])


def _mean_of_others(returns: Tensor, dim: int) -> Tensor:
    """The mean along ``dim`` of all finite ones but the own; 0 where there is no other."""
    is_finite = returns.isfinite()
    kept = torch.where(is_finite, returns, 0.0).double()
    others = is_finite.sum(dim, keepdim=True) - is_finite.to(torch.int64)
    return ((kept.sum(dim, keepdim=True) - kept) / others.clamp_min(1)).to(returns.dtype)


def _finite(returns: Tensor) -> tuple[Tensor, Tensor]:
    """Returns with those of trainings that diverged as 0, and the number of the others."""
    sound = returns.isfinite().all(0)
    return torch.where(sound, returns, 0.0), sound.sum()


def _blended(state: State, new: State, count: Tensor) -> State:
    """Moving averages; unchanged where all trainings diverged."""
    return {
        name: torch.where(count > 0, torch.lerp(new[name], x, _DECAY), x)
        for name, x in state.items()
    }


def _on(returns: Tensor, state: State) -> State:
    return {name: x.to(returns.device) for name, x in state.items()}


BASELINES: dict[Any, Callable[[], Baseline]] = {
    None: _none,
    "moving": _moving,
    "learned": _learned,
    "rollouts": _rollouts,
    "fitted_rollouts": _fitted,
}
