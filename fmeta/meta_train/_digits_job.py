"""The main job: meta-train a rule on digits, compare it with tuned baselines, write everything."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmeta import _files, combinators, evaluate, optimizers, plot, pretrained
from fmeta.estimators import full
from fmeta.meta_train import _loop
from fmeta.meta_train._config import TrainConfig
from fmeta.tasks import TaskFamily, digits

__all__ = ["train_on_digits"]

RATES = [10 ** (e / 2) for e in range(-8, 3)]  # 1e-4 ... 10

# Streams of tasks that never meet: meta-training draws from the run's own seed.
_VALIDATION, _TUNING, _COMPARISON = 1_000_003, 1_000_033, 1_000_037


def train_on_digits(
    config: TrainConfig,
    *,
    on_step: Callable[[dict[str, float]], None] | None = None,
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
        ValueError: a configuration that cannot be meant, or a rule with nothing to learn.
        FileExistsError: the run's folder holds another run.
        OSError: an unwritable folder, before any work.
    """
    config = config.checked()
    say = on_phase or (lambda text: None)
    folder = Path(config.out) / config.name
    if (folder / "config.json").exists() and not config.resume:
        raise FileExistsError(
            f"{folder} holds a run already: choose another --name, delete it, or add --resume"
        )
    _files.writable_folder(folder)
    stored = {k: v for k, v in dataclasses.asdict(config).items() if k != "resume"}
    if config.resume:
        _check_same(folder, stored)
    _files.write_json(folder / "config.json", stored)

    rule = config.build_rule()
    start = rule.init(torch.Generator().manual_seed(config.seed))
    family = digits((config.width,), batch_size=config.batch_size)
    say(f"meta-training {config.rule}: {config.num_steps} outer steps")
    result = _meta_train(config, rule, start, family, folder, on_step)
    pretrained.save(folder / "weights.safetensors", config.rule, result.meta_params)

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
    results = _results(curves, result)
    _files.write_json(folder / "results.json", results)
    plot.curves(
        folder / "curves.png",
        {
            "training images": {k: c.train for k, c in curves.items()},
            "held-out images": {k: c.held_out for k, c in curves.items()},
        },
        title=f"Digits, MLP 64-{config.width}-10: a learned optimizer beside tuned ones",
        mark=(config.horizon, "horizon of meta-training"),
    )
    return results


def _meta_train(
    config: TrainConfig,
    rule: Any,
    start: Any,
    family: TaskFamily,
    folder: Path,
    on_step: Callable[[dict[str, float]], None] | None,
) -> _loop.Result:
    options = config.unroll_options()
    estimator = full(
        rule,
        family,
        num_tasks=config.num_tasks,
        horizon=config.horizon,
        eval_split="validation",
        **options,
    )
    outer = combinators.chain(
        combinators.clip_by_global_norm(config.max_grad_norm),
        combinators.scheduled(optimizers.adam(config.outer_lr), _cosine, needs={"num_steps"}),
    )
    watch = full(
        rule, family, num_tasks=config.num_tasks, horizon=config.horizon, eval_split="validation"
    )

    def validate(meta_params: Any) -> Any:
        # The same tasks each time: a new best is a better rule, not an easier draw.
        return watch.estimate(meta_params, watch.init(meta_params, config.seed + _VALIDATION))[
            0
        ].loss

    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if config.resume and log.exists() else []
    rows = {int(json.loads(line)["step"]): line for line in lines}

    def record(metrics: dict[str, float]) -> None:
        rows[int(metrics["step"])] = json.dumps(metrics)
        _files.write_text(log, "\n".join(rows[k] for k in sorted(rows)) + "\n")
        if on_step is not None:
            on_step(metrics)

    arguments: dict[str, Any] = {
        "outer": outer,
        "num_steps": config.num_steps,
        "seed": config.seed,
        "validate": validate,
        "validate_every": config.validate_every,
        "patience": config.patience,
        "on_step": record,
    }
    if config.resume and (folder / "checkpoint" / "state.safetensors").exists():
        return _loop.resume(folder / "checkpoint", estimator, start, **arguments)
    return _loop.run(estimator, start, checkpoint_folder=folder / "checkpoint", **arguments)


def _cosine(t: Tensor, num_steps: Tensor | None) -> Tensor:
    """From 1 to 0; the last steps settle what the first ones found."""
    assert num_steps is not None  # `needs` asks for it
    return 0.5 * (1 + torch.cos(math.pi * t / num_steps))


def _results(curves: dict[str, evaluate.Curves], result: _loop.Result) -> dict[str, Any]:
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


def _check_same(folder: Path, stored: dict[str, Any]) -> None:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"there is no run to resume in {folder}")
    before = json.loads(path.read_text())
    changed = [k for k in stored if before.get(k) != stored[k]]
    if changed:
        raise ValueError(
            f"the run in {folder} was started with other settings ({', '.join(changed)}): resume "
            "with the same ones, or start a run of another --name"
        )
