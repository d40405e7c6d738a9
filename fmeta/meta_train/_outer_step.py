"""One outer step as a function of a state that can be saved."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmeta import _files, trees
from fmeta._functions import check_function
from fmeta._leaves import _listed, _shapes
from fmeta._numbers import check_real
from fmeta.estimators import Estimate, Estimator
from fmeta.estimators._arguments import check_size, checked_seed
from fmeta.meta_train import _averaging
from fmeta.meta_train._diverged import describe, diverged_tasks
from fmeta.meta_train._log import summary_writer
from fmeta.optimizer import Optimizer, check_optimizer_type

__all__ = ["NotFinite", "OnStep", "OuterSteps", "Settings", "State"]

Tree = Any
OnStep = Callable[[dict[str, Any]], None]


class Settings(NamedTuple):
    """The arguments of `run`, with its defaults."""

    outer: Optimizer
    num_steps: int
    seed: int = 0
    outer_params: Tree = None
    averaging: float | None = None
    validate: Callable[[Tree], Any] | None = None
    validate_every: int = 10
    patience: int | None = None
    select: str = "best"
    max_skipped: int = 10
    checkpoint_folder: Any = None
    checkpoint_every: int = 10
    about: Mapping[str, Any] | None = None
    log: Any = None
    tensorboard: Any = None
    on_step: OnStep | None = None

    def check(self) -> None:
        check_optimizer_type(self.outer, "outer")
        missing = sorted(self.outer.needs - {"loss", "num_steps"})
        if missing:
            raise ValueError(
                f"the outer optimizer needs {', '.join(missing)}, which meta-training cannot give: "
                "choose a rule that needs at most loss and num_steps"
            )
        checked_seed(self.seed)
        for name in ("num_steps", "validate_every", "checkpoint_every", "max_skipped"):
            check_size(name, getattr(self, name))
        if self.patience is not None:
            check_size("patience", self.patience)
            if self.validate is None:
                raise ValueError("patience counts validations, so it needs validate(meta_params)")
        if self.averaging is not None:
            check_real(averaging=self.averaging)
            if not 0 <= self.averaging < 1:
                raise ValueError(
                    "averaging must be a fraction of the outer steps in [0, 1), got "
                    f"{self.averaging}"
                )
        if self.validate is not None:
            check_function("validate", self.validate, "meta_params")
        if self.on_step is not None:
            check_function("on_step", self.on_step, "metrics")
        if self.about is not None and not isinstance(self.about, Mapping):
            raise TypeError(f"about must be a dict of plain values, got {self.about!r}")
        if self.select not in ("best", "last"):
            raise ValueError(f'select must be "best" or "last", got {self.select!r}')
        if self.tensorboard is not None:
            summary_writer()


class State(NamedTuple):
    """Everything that the next outer step depends on; saved as it is."""

    meta_params: Any
    hidden: Any
    estimator: Any
    average: _averaging.Average
    best_params: Any
    best_value: float
    misses: int
    step: int
    seed: int
    skipped: int
    skipped_in_a_row: int


class NotFinite(FloatingPointError):
    """An outer step that cannot be made, found by all ranks alike."""


class OuterSteps:
    """The functions from state to state that a run consists of; it holds no state itself."""

    def __init__(self, estimator: Estimator, meta_params: Tree, settings: Settings) -> None:
        settings.check()
        if not any(isinstance(x, Tensor) for x in trees.leaves(meta_params)):
            raise ValueError("meta_params hold no tensor: there is nothing to learn")
        self.estimator, self.settings, self.outer = estimator, settings, settings.outer
        self.ranks = estimator.ranks
        given = settings.outer_params
        self.outer_params = self.outer.init() if given is None else _fitting(given, self.outer)
        # Those that require a gradient would grow a graph from step to step.
        self.meta_params = trees.map(
            lambda x: x.detach() if isinstance(x, Tensor) else x, meta_params
        )

    def start(self) -> State:
        s, params = self.settings, self.meta_params
        hidden = self.outer.init_hidden(self.outer_params, params, num_steps=int(s.num_steps))
        stream = self.estimator.init(params, s.seed)
        average = _averaging.start(params, s.averaging)
        return State(params, hidden, stream, average, params, math.inf, 0, 0, s.seed, 0, 0)

    def is_over(self, state: State) -> bool:
        patience = self.settings.patience
        return patience is not None and state.misses >= patience

    def advance(self, state: State) -> tuple[State, dict[str, Any]]:
        estimate, stream = self.estimator.estimate(state.meta_params, state.estimator)
        metrics = _metrics(state.step, estimate)
        state = state._replace(estimator=stream)
        if math.isfinite(metrics["meta_loss"]) and math.isfinite(metrics["meta_grad_norm"]):
            state = self.descend(state, estimate)
        else:
            in_a_row = state.skipped_in_a_row + 1
            state = state._replace(skipped=state.skipped + 1, skipped_in_a_row=in_a_row)
            metrics["skipped"] = state.skipped_in_a_row
        state = state._replace(step=state.step + 1)
        if state.step % self.settings.validate_every == 0 or state.step == self.settings.num_steps:
            state, value = self.judge(state)
            if value is not None:
                metrics["validation"] = value
        return state, metrics

    def descend(self, state: State, estimate: Estimate) -> State:
        with torch.no_grad():
            params, hidden = self.outer.step(
                self.outer_params,
                state.meta_params,
                estimate.grads,
                state.hidden,
                loss=estimate.loss,
            )
            for path, x in _files.by_path(params).items():
                if isinstance(x, Tensor) and not x.isfinite().all():
                    raise NotFinite(
                        f"outer step {state.step}: the outer optimizer made the meta-parameter at "
                        f"{path} non-finite, from a finite meta-gradient: lower its learning rate"
                    )
            state = state._replace(meta_params=params, hidden=hidden, skipped_in_a_row=0)
            after = self.settings.averaging
            if after is not None and state.step + 1 > after * self.settings.num_steps:
                average = _averaging.add(state.average, self.iterate(state))
                state = state._replace(average=average)
        return state

    def check_skipped(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Raises when with this step too many in a row were skipped; its metrics come first."""
        most = self.settings.max_skipped
        if state.skipped_in_a_row >= most:
            where = describe(metrics)
            where = f"{where};" if where else f"outer step {metrics['step']}:"
            raise NotFinite(
                f"{where} the meta-loss is {metrics['meta_loss']} and the meta-gradient's norm "
                f"{metrics['meta_grad_norm']} ({state.skipped_in_a_row} such steps in a row, "
                f"max_skipped is {most}): shorten the horizon, lower the outer learning rate, or "
                "clip (fmeta.chain(fmeta.clip_by_global_norm(1.0), ...))"
            )

    def iterate(self, state: State) -> Tree:
        return self.outer.eval_params(self.outer_params, state.meta_params, state.hidden)

    def judged(self, state: State) -> Tree:
        if state.average.size:
            return _averaging.value(state.average, state.meta_params)
        return self.iterate(state)

    def judge(self, state: State) -> tuple[State, float | None]:
        if self.settings.validate is None:
            return state, None
        params = self.judged(state)
        # One rank judges, so that all go on from the same value.
        value = _number(self.settings.validate(params)) if self.ranks.is_first else 0.0
        value = float(self.ranks.broadcast(torch.tensor(value, dtype=torch.float64)))
        if value < state.best_value:  # never true for NaN
            return state._replace(best_params=params, best_value=value, misses=0), value
        return state._replace(misses=state.misses + 1), value


def _fitting(given: Tree, outer: Optimizer) -> Tree:
    """What is given as ``outer_params``, without its graph, if it is of this optimizer's form."""
    want, got = _shapes(outer.init()), _shapes(given)
    if got != want:
        raise ValueError(
            f"outer_params do not fit the outer optimizer: it learns {_listed(want)}, got "
            f"{_listed(got)}: give what its init() returns, fmeta.pretrained.load loads with it or "
            "its own meta-training gave; a hyper-parameter of a hand-made optimizer is an argument "
            "of its builder, or learned by fmeta.learn"
        )
    return trees.map(lambda x: x.detach() if isinstance(x, Tensor) else x, given)


def _number(value: Any) -> float:
    """What ``validate`` returned."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    one = one or (isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "biuf")
    if one:
        return float(value.item())
    if isinstance(value, numbers.Real):
        return float(value)
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(f"validate must return a number, got {got}: take the mean of several")


def _metrics(step: int, estimate: Estimate) -> dict[str, Any]:
    with torch.no_grad():  # what the estimator returned may carry a graph
        grads = [g for g in trees.leaves(estimate.grads) if isinstance(g, Tensor)]
        squares = [float(g.double().square().sum()) for g in grads]
        metrics = {
            "step": step,
            "meta_loss": float(estimate.loss),
            "meta_grad_norm": math.sqrt(sum(squares)),
        }
        if "signal_to_noise" in estimate.metrics:
            metrics["signal_to_noise"] = float(estimate.metrics["signal_to_noise"])
    return {**metrics, **diverged_tasks(estimate.metrics)}
