"""The main job: meta-train a rule on digits, compare it with tuned baselines, write everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmeta import combinators, evaluate, optimizers, plot
from fmeta.estimators import full
from fmeta.meta_train._config import TrainConfig
from fmeta.meta_train._job import Recipe, run_job
from fmeta.meta_train._loop import OnStep, Result
from fmeta.tasks import TaskFamily, digits

__all__ = ["train_on_digits"]

RATES = [10 ** (e / 2) for e in range(-8, 3)]  # 1e-4 ... 10

# Streams of tasks that never meet: meta-training draws from the run's own seed.
_VALIDATION, _TUNING, _COMPARISON = 1_000_003, 1_000_033, 1_000_037


def train_on_digits(
    config: TrainConfig,
    *,
    on_step: OnStep | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Runs the main job and writes ``weights.safetensors``, ``config.json``, ``metrics.jsonl``,
    ``results.json``, ``curves.png`` and ``checkpoint/`` into ``config.out/config.name``.

    Args:
        config: what to do.
        on_step: called with the metrics of each outer step.
        on_phase: called with a line of text as each phase begins.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: a configuration that cannot be meant, a rule with nothing to learn, or a run to
            resume that is of another configuration or damaged.
        FileExistsError: the run's folder holds another run.
        FileNotFoundError: it holds none, and one is to be resumed.
        BlockingIOError: another process is running in it.
        OSError: an unwritable folder, before any work.
    """
    return run_job(config.checked(), digits_recipe, on_step=on_step, on_phase=on_phase)


def digits_recipe(config: TrainConfig) -> Recipe:
    """Digits classifiers of one width; exact meta-gradients on validation images."""
    rule = config.build_rule()
    start = rule.init(torch.Generator().manual_seed(config.seed))
    family = digits((config.width,), batch_size=config.batch_size)
    sizes: dict[str, Any] = {"num_tasks": config.num_tasks, "horizon": config.horizon}
    estimator = full(rule, family, eval_split="validation", **sizes, **config.unroll_options())
    watch = full(rule, family, eval_split="validation", **sizes)

    def validate(meta_params: Any) -> Any:
        # The same tasks each time: a new best is a better rule, not an easier draw.
        state = watch.init(meta_params, config.seed + _VALIDATION)
        return watch.estimate(meta_params, state)[0].loss

    options = {
        "outer": combinators.chain(
            combinators.clip_by_global_norm(config.max_grad_norm),
            combinators.scheduled(optimizers.adam(config.outer_lr), _cosine, needs={"num_steps"}),
        ),
        "num_steps": config.num_steps,
        "seed": config.seed,
        "averaging": config.averaging,
        "validate": validate,
        "validate_every": config.validate_every,
        "patience": config.patience,
        "max_skipped": config.max_skipped,
        "checkpoint_every": config.save_every,
        "tensorboard": _tensorboard(config),
    }

    def compare(result: Result, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
        return _compare(config, rule, start, family, result, folder, say)

    return Recipe(config.rule, {}, estimator, start, options, compare)


def _tensorboard(config: TrainConfig) -> Path | None:
    return Path(config.out) / config.name / "tensorboard" if config.tensorboard else None


def _compare(
    config: TrainConfig,
    rule: Any,
    start: Any,
    family: TaskFamily,
    result: Result,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    say("tuning the baselines on validation images")
    lengths: dict[str, Any] = {"num_steps": config.eval_steps, "num_seeds": config.eval_seeds}
    rates = {
        name: evaluate.tune(family, builder, RATES, seed=config.seed + _TUNING, **lengths)
        for name, builder in (("sgd", optimizers.sgd), ("adam", optimizers.adam))
    }
    say("comparing on fresh seeds and held-out images")
    curves = evaluate.compare(
        family,
        {
            f"{config.rule}, meta-trained": (rule, result.meta_params),
            f"{config.rule}, untrained": (rule, start),
            f"SGD, tuned (lr {rates['sgd']:.2g})": (optimizers.sgd(rates["sgd"]), {}),
            f"Adam, tuned (lr {rates['adam']:.2g})": (optimizers.adam(rates["adam"]), {}),
        },
        seed=config.seed + _COMPARISON,
        **lengths,
    )
    say("drawing curves.png")
    plot.curves(
        folder / "curves.png",
        {
            "training images": {k: c.train for k, c in curves.items()},
            "held-out images": {k: c.held_out for k, c in curves.items()},
        },
        title=f"Digits, MLP 64-{config.width}-10: a learned optimizer beside tuned ones",
        mark=(config.horizon, "horizon of meta-training"),
    )
    return _results(curves, result)


def _cosine(t: Tensor, num_steps: Tensor | None) -> Tensor:
    """From 1 to 0; the last steps settle what the first ones found."""
    assert num_steps is not None  # `needs` asks for it
    return 0.5 * (1 + torch.cos(math.pi * t / num_steps))


def _results(curves: dict[str, evaluate.Curves], result: Result) -> dict[str, Any]:
    learned, *others = curves
    table = {
        name: {
            "final_train_loss": float(evaluate.final_loss(c.train).mean()),
            "final_held_out_loss": float(evaluate.final_loss(c.held_out).mean()),
            "diverged_seeds": int((~c.train.isfinite()).any(-1).sum()),
        }
        for name, c in curves.items()
    }
    ours = evaluate.final_loss(curves[learned].held_out)
    paired = {}
    for name in others:
        mean, low, high = evaluate.paired_difference(
            ours, evaluate.final_loss(curves[name].held_out)
        )
        paired[name] = {"mean": mean, "low": low, "high": high}
    return {
        "learned": learned,
        "outer_steps": result.step,
        "stopped_early": result.stopped_early,
        "table": table,
        "held_out_loss_minus": paired,
    }
