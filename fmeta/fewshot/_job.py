"""The few-shot job: meta-train a learner, test it beside baselines, write everything."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmeta import _files, combinators, optimizers
from fmeta.distributed import Ranks
from fmeta.fewshot._baselines import from_scratch, nearest_neighbour
from fmeta.fewshot._config import WITHOUT_STEPS, FewShotConfig
from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._estimator import estimator
from fmeta.fewshot._evaluate import Scores, evaluate
from fmeta.fewshot._figures import draw_adaptation, draw_curves, draw_episodes
from fmeta.fewshot._glyphs import contact_sheet, load_glyphs
from fmeta.fewshot._pretrained import fine_tuned, pretrained
from fmeta.fewshot._source import Source
from fmeta.meta_train import Recipe, Result, run_job
from fmeta.optimizer import Optimizer
from fmeta.random import fold_in

__all__ = ["few_shot"]

Say = Callable[[str], None]

_VALIDATION, _TEST = 1_000_003, 2_000_003  # seeds of their episodes


def few_shot(
    config: FewShotConfig,
    *,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_phase: Say | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Runs the few-shot job and writes ``weights.safetensors``, ``config.json``,
    ``metrics.jsonl``, ``results.json``, ``episodes.png``, ``adaptation.png``, with glyphs
    ``glyphs.png`` (a contact sheet of them), and ``checkpoint/`` into ``config.out/config.name``.

    Args:
        config: what to do.
        on_step: called with the metrics of each outer step.
        on_phase: called with a line of text as each phase begins.
        ranks: who share the episodes; rank 0 alone validates, tests and writes.

    Returns:
        What ``results.json`` holds: under ``"scores"`` mean, half the 95 % interval and the
        value of each episode, of the accuracy (of sinusoids: of the loss), by name of the learner
        or baseline, and how they were had.

    Raises:
        As `fmeta.meta_train.run_job`; ValueError for a configuration that cannot be meant,
        FileNotFoundError for data that is not there.
    """
    ranks = ranks or Ranks.alone()
    recipe = functools.partial(_recipe, ranks=ranks)
    return run_job(config.checked(), recipe, on_step=on_step, on_phase=on_phase, ranks=ranks)


def _recipe(config: FewShotConfig, ranks: Ranks) -> Recipe:
    source = _source(config, ranks)
    judged = _has_validation(source)
    test = config.source(test=True)
    learner = config.build(source)
    start = learner.init(fold_in(config.seed))

    def validate(meta_params: Any) -> float:
        return evaluate(
            learner,
            meta_params,
            source,
            num_episodes=config.validation_episodes,
            seed=config.seed + _VALIDATION,
            split="validation",
            loss=config.loss,
            num_threads=min(_cores(), torch.get_num_threads()),
        ).loss()[0]

    options = {
        "outer": _outer(config),
        "num_steps": config.outer_steps,
        "seed": config.seed,
        "validate": validate if judged else None,
        "validate_every": config.validate_every,
        "patience": config.patience if judged else None,
        "checkpoint_every": config.save_every,
    }

    def finish(result: Result, folder: Path, say: Say) -> dict[str, Any]:
        return _test(config, learner, start, test, result, folder, say)

    def save(path: Path, meta_params: Any) -> None:
        tensors = {k: x for k, x in _files.by_path(meta_params).items() if isinstance(x, Tensor)}
        _files.save_tree(path, tensors, {"fmeta.fewshot": config.learner})

    return Recipe(
        config.learner,
        {},
        estimator(
            learner, source, num_tasks=config.num_tasks, num_steps=config.outer_steps, ranks=ranks
        ),
        start,
        options,
        finish,
        save=save,
    )


def _source(config: FewShotConfig, ranks: Ranks) -> Source:
    """The episodes of meta-training; what has to be downloaded is, by one of the processes."""
    if not config.download or ranks.is_first:
        source = config.source(progress=ranks.is_first)
    if config.download:
        ranks.wait_for_all()
        if not ranks.is_first:
            source = config.source(progress=False)
    return source


def _outer(config: FewShotConfig) -> Optimizer:
    return combinators.chain(
        combinators.clip_by_global_norm(config.max_grad_norm),
        combinators.scheduled(optimizers.adam(config.outer_lr), _falling, needs={"num_steps"}),
    )


def _has_validation(source: Source) -> bool:
    """Whether there are classes to validate on, which those of the test must never be.

    Raises:
        ValueError: no classes to test on, before any work.
    """
    if source.classes and "test" not in source.classes:
        raise ValueError(
            f"{source.name} has no split test, but the table is of classes never seen: put some "
            f"into test/CLASS/IMAGE.png; there are {', '.join(source.classes)}"
        )
    return not source.classes or "validation" in source.classes


def _falling(t: Tensor, num_steps: Tensor | None) -> Tensor:
    assert num_steps is not None  # `needs` asks for it
    return 0.01 + 0.99 * 0.5 * (1 + torch.cos(math.pi * t / num_steps))


def _test(
    config: FewShotConfig,
    learner: MetaLearner,
    start: Any,
    source: Source,
    result: Result,
    folder: Path,
    say: Say,
) -> dict[str, Any]:
    def score(learner: MetaLearner, meta_params: Any, **options: Any) -> Scores:
        return evaluate(
            learner,
            meta_params,
            source,
            num_episodes=options.pop("num_episodes", config.test_episodes),
            seed=config.seed + _TEST,
            loss=config.loss,
            batch_size=10,
            num_threads=_cores(),
            **options,
        )

    say(f"testing on {config.test_episodes} episodes of {source.name}, of unseen classes")
    found = {f"{config.learner}, meta-trained": score(learner, result.meta_params)}
    if config.baselines and config.learner != "fine_tune":
        found[f"{config.learner}, untrained"] = score(learner, start)
    if config.baselines:
        scratch = from_scratch(
            config.network(source, head=True), loss=config.loss, batch_norm=config.batch_norm
        )
        found["trained from scratch on the support set"] = score(
            scratch, scratch.init(fold_in(config.seed))
        )
        if source.ways:
            found["nearest neighbour on pixels"] = score(nearest_neighbour(source.ways), {})
    has_steps = config.learner not in WITHOUT_STEPS
    tuned: dict[int, Tuned] = {}
    if config.baselines and config.task == "sinusoid":
        own = max(_steps(config, learner, result.meta_params, source, most=1), default=1)
        if own != 1:
            name = f"{config.learner}, meta-trained, 1 step"
            found[name] = score(learner, result.meta_params, num_steps=1)
        say("training on all sinusoids together, for comparison")
        tuned = _pretrained(config, source, {own, 1})
        for n, (fitted, params, _) in tuned.items():
            name = f"pretrained on all sinusoids, fine-tuned, {n} step{'s' * (n > 1)}"
            found[name] = score(fitted, params)
    say("drawing episodes.png and adaptation.png")
    path, seed = folder / "episodes.png", config.seed + _TEST
    if source.ways:
        draw_episodes(path, learner, result.meta_params, source, seed=seed)
    else:
        steps = (0, 1, None) if has_steps else (None,)
        beside = {"pretrained, 1 step": tuned[1][:2]} if 1 in tuned else {}
        draw_curves(
            path, learner, result.meta_params, source, seed=seed, steps=steps, beside=beside
        )
    if config.task == "glyphs":
        contact_sheet(folder / "glyphs.png", load_glyphs(config.root))
    # A curve has several points: of a part of the episodes, and so have the lines beside it.
    few = min(config.test_episodes, max(2, config.test_episodes // 5))
    drawn = few if has_steps else config.test_episodes
    of = f"the first {drawn} of {config.test_episodes}" if has_steps else f"{drawn}"
    draw_adaptation(
        folder / "adaptation.png",
        lambda steps: score(learner, result.meta_params, num_steps=steps, num_episodes=few),
        _steps(config, learner, result.meta_params, source),
        {
            name: Scores(*(values[:drawn] for values in scores))
            for name, scores in found.items()
            if not (has_steps and "meta-trained" in name)
        },
        title=f"{config.learner} on {source.name}, {episodes_of(source)}: {of} test episodes",
        is_loss=not source.ways,
    )
    return {
        "scores": {name: _row(s, is_loss=not source.ways) for name, s in found.items()},
        "measure": "accuracy" if source.ways else "mean squared error",
        "episodes": config.test_episodes,
        "task": {"name": source.name, "ways": source.ways, "shots": source.shots},
        "batch_norm": config.batch_norm if source.ways else "none",
        "validated": _has_validation(source),
        "fine_tuning_rates": {steps: rate for steps, (_, _, rate) in tuned.items()},
        "training": {
            "outer_steps": result.step,
            "stopped_early": result.stopped_early,
            "skipped": result.skipped,
        },
    }


def _cores() -> int:
    """Those this process may use, a few at most: each works on episodes of its own in memory."""
    usable = getattr(os, "sched_getaffinity", None)
    return min(8, len(usable(0)) if usable else os.cpu_count() or 1)


# A learner, meta-parameters for it, and the rate it was tuned to.
Tuned = tuple[MetaLearner, Any, float]


def _pretrained(config: FewShotConfig, source: Source, steps: set[int]) -> dict[int, Tuned]:
    """The network trained on all tasks together, fine-tuned in each of these numbers of steps.

    It sees what the learner saw: the same episodes, in as many steps of the same optimizer.
    """
    network = config.network(source)
    params = pretrained(
        network,
        config.source(),
        loss=config.loss,
        outer=_outer(config),
        num_tasks=config.num_tasks,
        num_steps=config.outer_steps,
        seed=config.seed,
        start=network.init(fold_in(config.seed)),
    )
    found: dict[int, Tuned] = {}
    for n in sorted(steps, reverse=True):
        fitted, rate = fine_tuned(
            network,
            params,
            source,
            num_steps=n,
            loss=config.loss,
            num_episodes=config.validation_episodes,
            seed=config.seed + _VALIDATION,
        )
        found[n] = (fitted, params, rate)
    return found


def episodes_of(source: Source) -> str:
    """What its episodes are called: ``"5-way 1-shot"``, or ``"10 points"``."""
    if source.ways:
        return f"{source.ways}-way {source.shots}-shot"
    return f"{source.shots} point{'s' * (source.shots != 1)}"


def _row(scores: Scores, is_loss: bool) -> dict[str, Any]:
    """Mean and interval, and the values of all episodes, for pairs with another run's."""
    values = scores.losses if is_loss else scores.accuracies
    mean, half = scores.loss() if is_loss else scores.accuracy()
    return {
        "mean": mean,
        "half_interval": half,
        "episodes": [round(float(v), 6) for v in values],
    }


def _steps(
    config: FewShotConfig,
    learner: MetaLearner,
    meta_params: Any,
    source: Source,
    most: int = 8,
) -> dict[int, bool]:
    """Numbers of adaptation steps to draw, and whether each is beyond that of meta-training.

    They go up to ``most`` times that.
    """
    if config.learner in WITHOUT_STEPS:
        return {}
    support = source.sample(fold_in(0), "test").support
    with torch.no_grad():
        losses = getattr(learner.adapt(meta_params, support), "losses", None)
    own = (config.num_steps or 100) if losses is None else len(losses)  # of fine_tune
    numbers = sorted({1, max(1, own // 2), own, *(k * own for k in (2, 4, 8) if k <= most)})
    if losses is not None:
        numbers = [0, *numbers]
    return {n: n > own for n in numbers}
