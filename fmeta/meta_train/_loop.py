"""The outer loop: estimate the meta-gradient, step an ordinary optimizer, watch, stop, save."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fmeta import _files
from fmeta.distributed import broadcast_tree, check_same
from fmeta.estimators import Estimator
from fmeta.estimators._arguments import check_estimator_type
from fmeta.meta_train import _checkpoint
from fmeta.meta_train._lock import locked
from fmeta.meta_train._log import StepLog
from fmeta.meta_train._outer_step import NotFinite, OnStep, OuterSteps, Settings, State
from fmeta.optimizer import Optimizer

__all__ = ["OnStep", "Result", "resume", "run"]

Tree = Any


class Result(NamedTuple):
    """What meta-training gives.

    Attributes:
        meta_params: the best by validation, or the last, as `run` was told; with averaging, of the
            averages.
        step: outer steps made, skipped ones included.
        history: the metrics of each outer step made in this call.
        stopped_early: whether validation stopped improving before the last step.
        skipped: outer steps whose estimate was not finite, and that changed nothing.
    """

    meta_params: Any
    step: int
    history: list[dict[str, Any]]
    stopped_early: bool
    skipped: int


def run(
    estimator: Estimator,
    meta_params: Tree,
    *,
    outer: Optimizer,
    num_steps: int,
    seed: int = 0,
    outer_params: Tree = None,
    averaging: float | None = None,
    validate: Callable[[Tree], Tensor | float] | None = None,
    validate_every: int = 10,
    patience: int | None = None,
    select: str = "best",
    max_skipped: int = 10,
    checkpoint_folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    about: Mapping[str, Any] | None = None,
    log: str | os.PathLike[str] | None = None,
    tensorboard: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """Meta-trains: ``num_steps`` estimates, each followed by a step of the outer optimizer.

    Args:
        estimator: gives ``(Estimate(loss, grads, metrics), state)``. Tasks that diverge it leaves
            out of both itself, and reports: ``metrics["diverged"]``, booleans ``(tasks,)``,
            ``metrics["diverged_at"]``, the inner steps of their trainings or -1,
            ``metrics["drawn"]``, the integers that tell which they are, and of a mixture
            ``metrics["family"]``; see `fmeta.estimators.Estimate`. One that several processes
            make together (``estimator.ranks``) is meta-trained by all of them: each calls this with
            the same arguments, makes the same outer steps and returns the same; rank 0 alone
            validates, logs and writes.
        meta_params: what is learned, at its start; the caller's initialisation. The outer steps
            are not recorded for differentiation, also where these require a gradient.
        outer: any `Optimizer`, hand-made or learned; clipping and schedules are combinators.
        num_steps: outer steps.
        seed: of the estimator's stream of tasks.
        outer_params: ``opt_params`` of the outer optimizer (weights of a learned one, as
            `fmeta.pretrained.load` or an earlier meta-training gave them), constants here; default
            ``outer.init()``.
        averaging: keep a running mean of the meta-parameters over the outer steps after this
            fraction of ``num_steps`` (0.5: over the second half), in their compute dtype. From
            then on it, not the last iterate, is validated and returned. None: no mean.
        validate: ``validate(meta_params) -> scalar``, lower is better; what is judged are the
            outer optimizer's ``eval_params``, or their mean.
        validate_every: outer steps between validations (there is one at the start and at the end).
        patience: early stopping after this many validations without a new best; None: never.
        select: ``"best"`` by validation is the result, or the ``"last"``.
        max_skipped: an outer step whose meta-loss or meta-gradient is not finite changes nothing
            but the position in the stream of tasks; this many in a row are an error, after
            the metrics of the last are written to ``log``.
        checkpoint_folder: where the whole state is saved, in one file, atomically; None: nowhere.
            On KeyboardInterrupt the last complete state is saved before the exception goes on
            (of several processes the last checkpoint stays what it is).
        checkpoint_every: outer steps between saves; there is one before the first step.
        about: plain values that say which run this is (the configuration). They are saved too, and
            `resume` refuses a checkpoint of a run with others.
        log: a ``.jsonl`` file to which the metrics of each outer step are appended. Wall-clock
            seconds, which differ from run to run, go to ``<name>.timing.jsonl`` beside it.
        tensorboard: a folder of event files; needs the extra ``fmeta[tensorboard]``.
        on_step: called with the metrics of each outer step.

    Returns:
        A `Result`.

        Metrics of an outer step are ``"step"``, ``"meta_loss"``, ``"meta_grad_norm"`` and, where
        there is one, ``"signal_to_noise"`` of the meta-gradient, ``"diverged"`` (share of the
        tasks), ``"diverged_tasks"`` (a list of dicts with ``"task"``, ``"family"``,
        ``"inner_step"`` and ``"drawn"``, where they are known), ``"skipped"`` (which in a row
        this one is), ``"validation"``.

    Raises:
        FloatingPointError: ``max_skipped`` skipped outer steps in a row, or an outer optimizer
            that makes parameters non-finite (with the step); a checkpoint of the state before it
            is saved first.
        FileExistsError: the folder holds a checkpoint already, or ``log`` is there: `resume`, or
            choose others.
        BlockingIOError: another run is using the folder.
        OSError: a folder or file that cannot be written, before any work where possible.
        ImportError: ``tensorboard`` without the package.
        ValueError: options that cannot be meant, meta-parameters without a tensor, an outer
            optimizer that needs more than ``loss`` and ``num_steps``, or ``outer_params`` of
            another structure or shape than its own; later, a ``validate`` that gives no number.
        TypeError: ``estimator`` is not an `Estimator`, ``outer`` not an `Optimizer`, ``seed`` no
            integer, ``validate`` or ``on_step`` no function, or one of other arguments.
    """
    settings = Settings(
        outer,
        num_steps,
        seed,
        outer_params,
        averaging,
        validate,
        validate_every,
        patience,
        select,
        max_skipped,
        checkpoint_folder,
        checkpoint_every,
        about,
        log,
        tensorboard,
        on_step,
    )
    return _Loop(estimator, meta_params, settings).from_start()


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

    The number of processes may be another one; then results are equal to rounding.

    Args:
        checkpoint_folder: the folder given to `run`.
        estimator, meta_params, outer, num_steps, seed: as given to `run`; of ``meta_params`` only
            structure and device are used, the values come from the checkpoint.
        **options: the further arguments of `run`. What ``log`` holds of outer steps after the
            checkpoint is cut off and written again; those before must be there.

    Returns:
        The `Result` of the whole run, with the history of the steps made now.

    Raises:
        FileNotFoundError: no checkpoint in the folder.
        ValueError: a checkpoint that is damaged, of another seed, or of another run (with the
            array's name); a log that is not there or lacks lines.
        FloatingPointError, BlockingIOError, OSError, ImportError, TypeError: as `run`.
    """
    path = Path(checkpoint_folder) / _checkpoint.NAME
    settings = Settings(outer, num_steps, seed, checkpoint_folder=checkpoint_folder, **options)
    return _Loop(estimator, meta_params, settings).from_checkpoint(path)


class _Loop:
    """`run` and `resume` from their arguments on: order, files, interruption."""

    def __init__(self, estimator: Estimator, meta_params: Tree, settings: Settings) -> None:
        check_estimator_type(estimator)
        self.ranks, self.estimator = estimator.ranks, estimator
        if not self.ranks.is_first:  # rank 0 alone reads and writes
            settings = settings._replace(log=None, tensorboard=None, on_step=None)
        self.steps = OuterSteps(estimator, meta_params, settings)
        self.settings, self.about = settings, dict(settings.about or {})

    def from_start(self) -> Result:
        state, folder, log = self.steps.start(), self.settings.checkpoint_folder, self.settings.log
        if log is not None:
            _files.writable_folder(Path(log).parent)
            if Path(log).exists():
                raise FileExistsError(
                    f"{log} is the log of another run: choose another name, delete it, or go on "
                    "with its run by resume(...)"
                )
        if folder is None or not self.ranks.is_first:
            return self.begin(state)
        _files.by_path(state)  # raises where it cannot be saved, before any work
        with locked(_files.writable_folder(folder)):
            _files.remove_leftovers(Path(folder))
            path = Path(folder) / _checkpoint.NAME
            if path.exists():
                raise FileExistsError(
                    f"{path} is the checkpoint of another run: go on with it by resume(...), "
                    "delete it, or choose another folder"
                )
            return self.begin(state)

    def from_checkpoint(self, path: Path) -> Result:
        state = self.steps.start()
        state = state._replace(estimator=self.estimator.gather(state.estimator))
        if not self.ranks.is_first:
            return self.go(self.handed_out(state))
        _checkpoint.require(path)  # before its folder is made
        with locked(_files.writable_folder(path.parent)):
            _files.remove_leftovers(path.parent)
            state = _checkpoint.load(path, state, self.about)
            if state.seed != self.settings.seed:
                raise ValueError(
                    f"{path} is of a run with seed {state.seed}, not {self.settings.seed}: resume "
                    "with its seed"
                )
            return self.go(self.handed_out(state))

    def begin(self, state: State) -> Result:
        s = self.settings
        start = (state.meta_params, state.hidden, s.num_steps, s.seed)
        check_same(start, self.ranks, "meta-parameters, an outer optimizer, num_steps or a seed")
        self.save(state)  # from here on a killed run can be resumed
        return self.go(state)

    def handed_out(self, state: State) -> State:
        """The state that rank 0 has read, of which each rank keeps its part."""
        state = broadcast_tree(state, self.ranks)
        return state._replace(estimator=self.estimator.scatter(state.estimator))

    def go(self, state: State) -> Result:
        s = self.settings
        history: list[dict[str, Any]] = []
        saved = state.step
        with StepLog(s.log, s.tensorboard, state.step) as log:
            try:
                if state.step == 0 and math.isinf(state.best_value) and state.misses == 0:
                    state, _ = self.steps.judge(state)
                while state.step < s.num_steps and not self.steps.is_over(state):
                    began = time.perf_counter()
                    new, metrics = self.steps.advance(state)
                    log.write(metrics, time.perf_counter() - began)
                    history.append(metrics)
                    self.steps.check_skipped(new, metrics)
                    # Last, so that an interrupted state is never ahead of the log.
                    state = new
                    if s.on_step is not None:
                        s.on_step(metrics)
                    last = state.step == s.num_steps or self.steps.is_over(state)
                    if last or state.step % s.checkpoint_every == 0:
                        log.sync()
                        self.save(state)
                        saved = state.step
            except (KeyboardInterrupt, Exception) as error:
                # Several ranks can only save together, so not where one of them was stopped.
                together = self.ranks.size == 1 or isinstance(error, NotFinite)
                if together and (state.step > saved or state.step == 0):
                    # Where that fails too (a full disk), what happened first is what to tell.
                    with contextlib.suppress(OSError):
                        log.sync()
                        self.save(state)
                raise
        best = s.validate is not None and s.select == "best"
        params = state.best_params if best else self.steps.judged(state)
        return Result(params, state.step, history, state.step < s.num_steps, state.skipped)

    def save(self, state: State) -> None:
        folder = self.settings.checkpoint_folder
        if folder is None:
            return
        check_same((state.meta_params, state.hidden), self.ranks, "meta-parameters")
        state = state._replace(estimator=self.estimator.gather(state.estimator))
        if self.ranks.is_first:
            _checkpoint.save(Path(folder) / _checkpoint.NAME, state, self.about)
