"""A job: meta-train, save the weights, compare; resumable in each phase, byte for byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fmeta import _files, pretrained
from fmeta.distributed import Ranks
from fmeta.estimators import Estimator
from fmeta.meta_train import _checkpoint, _loop
from fmeta.meta_train._run_folder import METRICS, RESULTS, WEIGHTS, WHERE, read_object, run_folder

__all__ = ["Recipe", "run_job"]

Config = TypeVar("Config")
Say = Callable[[str], None]
_NEW, _RESUMED, _FINISHED = b"new", b"resumed", b"finished"


class Recipe(NamedTuple):
    """What is particular to a job.

    Attributes:
        rule_name: of the learned rule, a builder in `fmeta.optimizers`.
        rule_arguments: of that builder; saved with the weights.
        estimator: of the meta-gradient.
        start: meta-parameters to start from, structured as the rule's ``opt_params``.
        options: further arguments of `fmeta.meta_train.run`, with ``outer`` and ``num_steps``.
        evaluate: ``evaluate(result, folder, say) -> results``, a dict of plain values; draws its
            figures into the folder. A pure function of the result: it may be called again.
        save: ``save(path, meta_params)`` writes the weights; default: as those of ``rule_name``.
        beside: a context that meta-training and evaluation run in; for work on the side.
    """

    rule_name: str
    rule_arguments: Mapping[str, Any]
    estimator: Estimator
    start: Any
    options: Mapping[str, Any]
    evaluate: Callable[[_loop.Result, Path, Say], dict[str, Any]]
    beside: AbstractContextManager[Any] = nullcontext()
    save: Callable[[Path, Any], None] | None = None


def run_job(
    config: Any,
    recipe: Callable[[Any], Recipe],
    *,
    on_step: _loop.OnStep | None = None,
    on_phase: Say | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Runs a job in ``config.out/config.name``, or with ``config.resume`` the rest of it.

    The files say how far a run has come: with ``results.json``, written last, it is finished; a
    checkpoint of the last outer step leads straight to the evaluation.

    Args:
        config: a frozen dataclass with ``out``, ``name``, ``resume``; all fields plain values.
        recipe: makes the `Recipe` from it.
        on_step: called with the metrics of each outer step.
        on_phase: called with a line of text as each phase begins.
        ranks: who meta-train together, with the estimator of the recipe; rank 0 alone writes,
            shows and evaluates.

    Returns:
        What ``results.json`` holds; ``{}`` on ranks but the first.

    Raises:
        As `fmeta.meta_train.run` and the recipe's functions, and for the folder:
        FileExistsError, FileNotFoundError, BlockingIOError, OSError, ValueError.
    """
    say = on_phase or (lambda text: None)
    values, defaults = dataclasses.asdict(config), _defaults(config)
    ranks = ranks or Ranks.alone()
    if not ranks.is_first:
        how = ranks.broadcast_bytes(b"")
        if how != _FINISHED:
            folder = Path(config.out) / config.name
            _meta_train(recipe(config), folder, _about(values), how, None, lambda text: None)
        return {}
    with run_folder(Path(config.out) / config.name, values, defaults) as folder:
        checkpoint = folder / "checkpoint" / _checkpoint.NAME
        how = _RESUMED if checkpoint.exists() else _NEW
        how = ranks.broadcast_bytes(_FINISHED if (folder / RESULTS).exists() else how)
        if how == _FINISHED:
            say(f"the run in {folder} is finished: nothing to do")
            return read_object(folder / RESULTS)
        about = _about(values)
        if how == _RESUMED:
            about = _checkpoint.about_as_saved(checkpoint, about, defaults, WHERE)
        made = recipe(config)
        with made.beside:
            result = _meta_train(made, folder, about, how, on_step, say)
            weights = folder / WEIGHTS
            if made.save is None:
                pretrained.save(weights, made.rule_name, result.meta_params, **made.rule_arguments)
            else:
                made.save(weights, result.meta_params)
            results = made.evaluate(result, folder, say)
        _files.write_json(folder / RESULTS, results)
        return results


def _about(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration says which run this is."""
    return {name: value for name, value in values.items() if name not in WHERE}


def _defaults(config: Any) -> dict[str, Any]:
    return {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
    }


def _meta_train(
    recipe: Recipe,
    folder: Path,
    about: Mapping[str, Any],
    how: bytes,
    on_step: _loop.OnStep | None,
    say: Say,
) -> _loop.Result:
    checkpoint = folder / "checkpoint"
    arguments: dict[str, Any] = {
        **recipe.options,
        "about": about,
        "log": folder / METRICS,
        "on_step": on_step,
    }
    steps = f"meta-training {recipe.rule_name}: {arguments['num_steps']} outer steps"
    if how == _RESUMED:
        say(f"{steps}, from the checkpoint on")
        return _loop.resume(checkpoint, recipe.estimator, recipe.start, **arguments)
    say(steps)
    return _loop.run(recipe.estimator, recipe.start, checkpoint_folder=checkpoint, **arguments)
