"""The main job: meta-train a rule on digits, compare it with tuned baselines, write everything."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmeta import combinators, estimators, evaluate, optimizers, plot
from fmeta.distributed import Ranks
from fmeta.estimators import Estimator
from fmeta.evaluate import Evaluation
from fmeta.meta_train._config import TrainConfig
from fmeta.meta_train._job import Recipe, run_job
from fmeta.meta_train._loop import OnStep, Result
from fmeta.meta_train._tuning import COMPARISON, Tuning, lengths
from fmeta.meta_train._validation import Validation
from fmeta.optimizer import Optimizer
from fmeta.tasks import mixture

__all__ = ["late_log_loss", "train_on_digits"]

_VALIDATION = 1_000_003  # seed of its tasks, away from those of meta-training and comparison


def train_on_digits(
    config: TrainConfig,
    *,
    on_step: OnStep | None = None,
    on_phase: Callable[[str], None] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Runs the main job and writes ``weights.safetensors``, ``config.json``, ``metrics.jsonl``,
    ``results.json``, ``curves.png`` and ``checkpoint/`` into ``config.out/config.name``.

    Args:
        config: what to do.
        on_step: called with the metrics of each outer step.
        on_phase: called with a line of text as each phase begins.
        ranks: who share the tasks; rank 0 alone validates, compares and writes.

    Returns:
        What ``results.json`` holds: a `fmeta.evaluate.Results` as a dict, and under ``"training"``
        how meta-training ended. ``{}`` on ranks but the first.

    Raises:
        ValueError: a configuration that cannot be meant, a rule with nothing to learn, or a run to
            resume that is of another configuration or damaged.
        FileExistsError: the run's folder holds another run.
        FileNotFoundError: it holds none, and one is to be resumed.
        BlockingIOError: another process is running in it.
        OSError: an unwritable folder, before any work.
    """
    ranks = ranks or Ranks.alone()
    recipe = functools.partial(digits_recipe, ranks=ranks)
    return run_job(config.checked(), recipe, on_step=on_step, on_phase=on_phase, ranks=ranks)


def digits_recipe(config: TrainConfig, ranks: Ranks) -> Recipe:
    """Models of several kinds on digits; the rule is to end with a low loss, and soon."""
    rule = config.build_rule()
    start = rule.init(torch.Generator().manual_seed(config.seed))
    validation = Validation(
        rule,
        config.family(config.validation_task),
        num_steps=max(config.horizons),
        num_seeds=config.validation_seeds,
        seed=config.seed + _VALIDATION,
    )
    options = {
        "outer": combinators.chain(
            combinators.clip_by_global_norm(config.max_grad_norm),
            combinators.scheduled(
                optimizers.adam(config.outer_lr, betas=(0.9, 0.98)), _falling, needs={"num_steps"}
            ),
        ),
        "num_steps": config.num_steps,
        "seed": config.seed,
        "averaging": config.averaging,
        "validate": validation,
        "validate_every": config.validate_every,
        "patience": config.patience,
        "max_skipped": config.max_skipped,
        "checkpoint_every": config.save_every,
        "tensorboard": _tensorboard(config),
    }

    # Several ranks leave no core idle for it.
    beside = config.beside and ranks.size == 1
    tuning = Tuning(dataclasses.replace(config, beside=beside))

    def compare(result: Result, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
        return _compare(config, rule, start, result, tuning, folder, say)

    return Recipe(config.rule, {}, _estimator(config, rule, ranks), start, options, compare, tuning)


def late_log_loss(losses: Tensor, evals: Tensor | None, t: Tensor, horizon: Tensor) -> Tensor:
    """Logarithm of the loss, with eleven times the weight in the last fifth of a training.

    A rule is to end low; the little weight before tells it early what leads there. Logarithms make
    tasks of different losses count alike.
    """
    late = (t >= 0.8 * horizon).to(losses.dtype)
    seen = losses if evals is None else evals
    return (1 + 10 * late) / 3 * seen.clamp(max=1e4).log()


def _estimator(config: TrainConfig, rule: Optimizer, ranks: Ranks) -> Estimator:
    family = mixture([config.family(name) for name in config.tasks])
    shared: dict[str, Any] = {"num_tasks": config.num_tasks, "ranks": ranks}
    whole = {**shared, "horizon": max(config.horizons), "checkpoint": "sqrt"}
    if config.estimator == "full":
        return estimators.full(rule, family, meta_loss=_late_log_loss_of_run, **whole)
    if config.estimator == "score_function":
        noise: dict[str, Any] = {"std": config.std, "baseline": "learned"}
        return estimators.score_function(rule, family, meta_loss=late_log_loss, **noise, **whole)
    options: dict[str, Any] = {
        **shared,
        "horizon": config.horizons,
        "truncation": config.truncation,
        "meta_loss": late_log_loss,
    }
    if config.estimator == "truncated":
        return estimators.truncated(rule, family, compile=config.compile, **options)
    # Else a strategy of the same name and arguments.
    evolve = getattr(estimators, config.estimator)
    return evolve(rule, family, std=config.std, compile=config.compile, **options)


def _late_log_loss_of_run(run: Any) -> Tensor:
    t = torch.arange(len(run.losses), device=run.losses.device)
    return late_log_loss(run.losses, None, t, torch.tensor(len(run.losses))).mean()


def _falling(t: Tensor, num_steps: Tensor | None) -> Tensor:
    """From 1 to a twentieth; the last steps settle what the first ones found."""
    assert num_steps is not None  # `needs` asks for it
    return 0.05 + 0.95 * 0.5 * (1 + torch.cos(math.pi * t / num_steps))


def _tensorboard(config: TrainConfig) -> Path | None:
    return Path(config.out) / config.name / "tensorboard" if config.tensorboard else None


def _compare(
    config: TrainConfig,
    rule: Optimizer,
    start: Any,
    result: Result,
    tuning: Tuning,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    horizon = max(config.horizons)
    contenders = {
        f"{config.rule}, meta-trained": (rule, result.meta_params),
        f"{config.rule}, untrained": (rule, start),
    }
    found: dict[str, Evaluation] = {}
    for steps, names in lengths(config).items():
        say(f"comparing on fresh seeds and held-out images, {steps} steps")
        found[f"{steps} steps"] = evaluate.run(
            config.family(config.eval_task),
            contenders,
            num_steps=steps,
            num_seeds=max(2, config.eval_seeds // 2) if steps > horizon else config.eval_seeds,
            seed=config.seed + COMPARISON,
            baselines=names,
            rates=tuning.searches(steps),
        )
    images = "freshly transformed digits" if config.online else "digits"
    title = f"{config.eval_task} on {images}: a learned optimizer beside tuned ones"
    results = evaluate.Results(found, title, (horizon, "longest of meta-training"))
    say("drawing curves.png")
    plot.evaluations(folder / "curves.png", found, title=title, mark=results.mark)
    training = {
        "outer_steps": result.step,
        "stopped_early": result.stopped_early,
        "skipped": result.skipped,
    }
    return {**results.to_dict(), "training": training}
