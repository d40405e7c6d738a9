"""The outer loop: estimate the meta-gradient, step an ordinary optimizer, watch, stop, save."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import _files, trees
from fmeta.estimators import Estimator
from fmeta.optimizer import Optimizer, check_optimizer_type

__all__ = ["Result", "resume", "run"]

Tree = Any
_CHECKPOINT = "state.safetensors"


class Result(NamedTuple):
    """What meta-training gives.

    Attributes:
        meta_params: the best by validation, or the last without validation.
        step: outer steps made.
        history: one dict of numbers for each outer step made in this call.
        stopped_early: whether validation stopped improving before the last step.
    """

    meta_params: Any
    step: int
    history: list[dict[str, float]]
    stopped_early: bool


class _State(NamedTuple):
    meta_params: Any
    hidden: Any
    estimator: Any
    best_params: Any
    best_value: float
    misses: int
    step: int
    seed: int


def run(
    estimator: Estimator,
    meta_params: Tree,
    *,
    outer: Optimizer,
    num_steps: int,
    seed: int = 0,
    outer_params: Tree = None,
    validate: Callable[[Tree], Tensor | float] | None = None,
    validate_every: int = 10,
    patience: int | None = None,
    checkpoint_folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    on_step: Callable[[dict[str, float]], None] | None = None,
    _restored: Any = None,
) -> Result:
    """Meta-trains: ``num_steps`` estimates, each followed by a step of the outer optimizer.

    Args:
        estimator: gives ``(Estimate(loss, grads, metrics), state)``.
        meta_params: what is learned, at its start; the caller's initialisation. The outer steps
            are not recorded for differentiation, also where these require a gradient.
        outer: any `Optimizer`, hand-made or learned.
        num_steps: outer steps.
        seed: of the estimator's stream of tasks.
        outer_params: ``opt_params`` of the outer optimizer; default ``outer.init()``.
        validate: ``validate(meta_params) -> scalar``, lower is better.
        validate_every: outer steps between validations (there is one at the start and at the end).
        patience: early stopping after this many validations without a new best; None: never.
        checkpoint_folder: where the whole state is saved, in one file, atomically; None: nowhere.
            On KeyboardInterrupt the last complete state is saved before the exception goes on.
        checkpoint_every: outer steps between saves.
        on_step: called after each step with ``{"step", "meta_loss", "meta_grad_norm"}`` and, where
            there was one, ``"validation"``.

    Returns:
        A `Result`. With ``validate``, its ``meta_params`` are those of the best validation.

    Raises:
        FloatingPointError: a meta-loss or meta-gradient that is not finite (with the step); a
            checkpoint of the state before it is saved first.
        FileExistsError: the folder holds a checkpoint already: `resume` it, or choose another.
        OSError: an unwritable folder, before any work.
        ValueError: options that cannot be meant, or meta-parameters without a tensor.
        TypeError: ``outer`` is not an `Optimizer`.
    """
    check_optimizer_type(outer, "outer")
    if not any(isinstance(x, Tensor) for x in trees.leaves(meta_params)):
        raise ValueError("meta_params hold no tensor: there is nothing to learn")
    if checkpoint_folder is not None and _restored is None:
        path = Path(checkpoint_folder) / _CHECKPOINT
        if path.exists():
            raise FileExistsError(
                f"{path} is the checkpoint of another run: go on with it by resume(...), delete "
                "it, or choose another folder"
            )
    loop = _Loop(
        estimator,
        outer,
        outer.init() if outer_params is None else outer_params,
        num_steps,
        validate,
        validate_every,
        patience,
        checkpoint_folder,
        checkpoint_every,
        on_step,
    )
    return loop.go(loop.start(meta_params, seed) if _restored is None else _restored)


def resume(
    checkpoint_folder: str | os.PathLike[str],
    estimator: Estimator,
    meta_params: Tree,
    *,
    outer: Optimizer,
    num_steps: int,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Goes on from a checkpoint that `run` saved, bit for bit as if it had not stopped.

    Args:
        checkpoint_folder: the folder given to `run`.
        estimator, meta_params, outer, num_steps, seed: as given to `run`; of ``meta_params`` only
            structure and device are used, the values come from the checkpoint.
        **options: the further arguments of `run`.

    Raises:
        FileNotFoundError: no checkpoint in the folder.
        ValueError: a checkpoint that is damaged, of another seed, or of another run (with the
            array's name).
    """
    path = Path(checkpoint_folder) / _CHECKPOINT
    theta = options.get("outer_params")
    theta = outer.init() if theta is None else theta
    like = _Loop(estimator, outer, theta, num_steps).start(meta_params, seed)
    return run(
        estimator,
        meta_params,
        outer=outer,
        num_steps=num_steps,
        seed=seed,
        checkpoint_folder=checkpoint_folder,
        _restored=_read(path, like),
        **options,
    )


class _Loop(NamedTuple):
    estimator: Estimator
    outer: Optimizer
    outer_params: Any
    num_steps: int
    validate: Callable[[Tree], Any] | None = None
    validate_every: int = 10
    patience: int | None = None
    folder: Any = None
    checkpoint_every: int = 10
    on_step: Callable[[dict[str, float]], None] | None = None

    def start(self, meta_params: Tree, seed: int) -> _State:
        # Those that require a gradient would grow a graph from step to step.
        meta_params = trees.map(lambda x: x.detach() if isinstance(x, Tensor) else x, meta_params)
        hidden = self.outer.init_hidden(self.outer_params, meta_params, num_steps=self.num_steps)
        state = self.estimator.init(meta_params, seed)
        return _State(meta_params, hidden, state, meta_params, math.inf, 0, 0, seed)

    def go(self, state: _State) -> Result:
        for name in ("num_steps", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.patience is not None and (self.patience < 1 or self.validate is None):
            raise ValueError("patience must be at least 1 and needs validate")
        if self.folder is not None:
            _files.writable_folder(self.folder)
            _files.by_path(state)  # raises where it cannot be saved, before any work
        history: list[dict[str, float]] = []
        try:
            if state.step == 0 and math.isinf(state.best_value) and state.misses == 0:
                state, _ = self.judge(state)
            while state.step < self.num_steps and not self.is_over(state):
                state, metrics = self.advance(state)
                history.append(metrics)
                if self.on_step is not None:
                    self.on_step(metrics)
                if state.step % self.checkpoint_every == 0 or state.step == self.num_steps:
                    self.save(state)
        except (KeyboardInterrupt, FloatingPointError):
            self.save(state)
            raise
        best = state.meta_params if self.validate is None else state.best_params
        return Result(best, state.step, history, state.step < self.num_steps)

    def is_over(self, state: _State) -> bool:
        return self.patience is not None and state.misses >= self.patience

    def advance(self, state: _State) -> tuple[_State, dict[str, float]]:
        estimate, estimator_state = self.estimator.estimate(state.meta_params, state.estimator)
        with torch.no_grad():  # what the estimator returned may carry a graph
            squares = [float(g.double().square().sum()) for g in trees.leaves(estimate.grads)]
        norm, loss = math.sqrt(sum(squares)), float(estimate.loss)
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise FloatingPointError(
                f"outer step {state.step}: the meta-loss is {loss} and the meta-gradient's norm "
                f"{norm}: inner training diverged; shorten the horizon, lower the outer learning "
                "rate, or clip (fmeta.chain(fmeta.clip_by_global_norm(1.0), ...))"
            )
        with torch.no_grad():
            params, hidden = self.outer.step(
                self.outer_params,
                state.meta_params,
                estimate.grads,
                state.hidden,
                loss=estimate.loss,
            )
        metrics = {"step": float(state.step), "meta_loss": loss, "meta_grad_norm": norm}
        state = state._replace(
            meta_params=params, hidden=hidden, estimator=estimator_state, step=state.step + 1
        )
        if state.step % self.validate_every == 0 or state.step == self.num_steps:
            state, value = self.judge(state)
            if value is not None:
                metrics["validation"] = value
        return state, metrics

    def judge(self, state: _State) -> tuple[_State, float | None]:
        if self.validate is None:
            return state, None
        value = float(self.validate(state.meta_params))
        if value < state.best_value:  # never true for NaN
            return state._replace(best_params=state.meta_params, best_value=value, misses=0), value
        return state._replace(misses=state.misses + 1), value

    def save(self, state: _State) -> None:
        if self.folder is None:
            return
        flat = _files.by_path(state)
        numbers = {n: x for n, x in flat.items() if not isinstance(x, Tensor)}
        tensors = {n: x for n, x in flat.items() if isinstance(x, Tensor)}
        _files.save_tree(Path(self.folder) / _CHECKPOINT, tensors, {"numbers": json.dumps(numbers)})


def _read(path: Path, like: _State) -> _State:
    spec, flat = trees.flatten(like)[1], _files.by_path(like)
    metadata = _files.read_metadata(path)
    if "numbers" not in metadata:
        raise ValueError(f"{path} is no checkpoint of fmeta.meta_train")
    wanted = {n: x for n, x in flat.items() if isinstance(x, Tensor)}
    numbers, tensors = json.loads(metadata["numbers"]), _files.load_tree(path, wanted)
    missing = [n for n in flat if n not in numbers and n not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {missing}: it is of another estimator or optimizer")
    if numbers["seed"] != like.seed:
        raise ValueError(
            f"{path} is of a run with seed {numbers['seed']}, not {like.seed}: resume with its seed"
        )
    return trees.unflatten(
        spec,
        [tensors[n].to(x.device) if isinstance(x, Tensor) else numbers[n] for n, x in flat.items()],
    )
