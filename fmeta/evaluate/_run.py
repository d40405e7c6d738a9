"""Optimizers side by side: same initial parameters, same batches, tuned baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.evaluate._baselines import BASELINES, Baseline, get_baselines
from fmeta.evaluate._compare import Curves
from fmeta.evaluate._evaluation import Evaluation, Outcome, band
from fmeta.evaluate._measure import Measured, draw, groups, log_spaced, measure
from fmeta.evaluate._statistics import final_loss, steps_to_reach
from fmeta.evaluate._tune import Search, search_rates
from fmeta.optimizer import Optimizer, check_optimizer_type
from fmeta.tasks import TaskFamily, extras_of_task
from fmeta.tasks._family import device_of_tasks

__all__ = ["run"]


class _Entry(NamedTuple):
    """One optimizer of the comparison, ready to train with."""

    label: str
    role: str
    optimizer: Optimizer
    opt_params: Any
    search: Search | None = None
    lr: float | None = None


def run(
    family: TaskFamily,
    contenders: Mapping[str, tuple[Optimizer, Any]],
    *,
    num_steps: int,
    num_seeds: int = 10,
    seed: int,
    baselines: Iterable[str] | Mapping[str, Baseline] = tuple(BASELINES),
    reference: str | None = "adam",
    rates: Mapping[str, float | Search] | None = None,
    tune_seeds: int = 3,
    split: str = "train",
    held_out: str = "test",
    validation: str = "validation",
    held_out_points: int = 40,
    final_batches: int = 16,
    chunk_size: int | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> Evaluation:
    """Trains fresh models with each optimizer, all from the same start and on the same batches.

    Each baseline is first tuned, for as many steps, on other tasks and the validation split
    (`search_rates`); the contenders are taken as they are. A seed with a loss that is not finite
    counts as diverged: its losses enter all means as infinite.

    Args:
        family: where the tasks come from.
        contenders: name -> ``(optimizer, opt_params)``; the first is what tables compare with the
            rest.
        num_steps: inner steps T.
        num_seeds: tasks, at least two.
        seed: of the tasks; use one that meta-training did not see.
        baselines: names out of ``BASELINES``, or a dict of `Baseline`.
        reference: to the final training loss of which optimizer the others' steps are counted; None
            or a baseline that is not among ``baselines``: they are not.
        rates: learning rates by baseline, or what `search_rates` found, that are known already.
        tune_seeds: tasks that each learning rate is tried on.
        split: what is trained on.
        held_out: what is evaluated on.
        validation: what the baselines are tuned on.
        held_out_points: at how many steps, about evenly spaced in log, the held-out loss is taken
            for the curve, each time on four fresh batches; a point costs four forward passes.
        final_batches: fresh batches for the final held-out loss and metrics.
        chunk_size: models trained at once by `torch.vmap`; None: all. Fewer take less memory; with
            1 nothing is vmapped, for models that cannot be.
        on_phase: called with a line of text as each optimizer begins.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: fewer than two seeds, no step, unknown baselines, names that occur twice, rates
            of no baseline, an optimizer that needs what the family's ``extras`` do not give.
        TypeError: a contender that is no pair, or not of an optimizer.

    Example:
        >>> import fmeta
        >>> found = run(
        ...     fmeta.tasks.digits((8,), batch_size=16),
        ...     {"sign": (fmeta.optimizers.adam(0.01, betas=(0, 0)), {})},
        ...     num_steps=5, num_seeds=2, seed=0, baselines=["adam"], rates={"adam": 0.01},
        ... )
        >>> list(found.outcomes)
        ['sign', 'adam']
    """
    say = on_phase or (lambda text: None)
    chosen = baselines if isinstance(baselines, Mapping) else get_baselines(baselines)
    known = dict(rates or {})
    _check(contenders, chosen, known, num_steps, num_seeds, chunk_size)
    ready = [pair[0] for pair in contenders.values()]
    for optimizer in ready + [b.build(b.rates[0]) for b in chosen.values() if b.rates]:
        extras_of_task(family, optimizer)  # raises where it gets not what it needs: before tuning
    at = log_spaced(num_steps, held_out_points)
    device = device_of_tasks(family, [pair[1] for pair in contenders.values()])
    drawn = [
        draw(
            family,
            members,
            seed=seed,
            num_steps=num_steps,
            num_points=len(at),
            num_fresh=final_batches,
            split=split,
            held_out=held_out,
            device=device,
        )
        for members in groups(num_seeds, chunk_size)
    ]

    def tuned(baseline: Baseline, found: float | Search | None) -> _Entry:
        if found is None:
            say(f"tuning {baseline.label} on validation data")
            found = search_rates(
                family,
                baseline.build,
                baseline.rates,
                num_steps=num_steps,
                num_seeds=tune_seeds,
                seed=seed,
                split=split,
                held_out=validation,
                chunk_size=chunk_size,
            )
        search, lr = (found, found.rate) if isinstance(found, Search) else (None, found)
        return _Entry(baseline.label, "baseline", baseline.build(lr), {}, search, lr)

    def measured_with(entry: _Entry) -> Measured:
        say(f"training with {entry.label}")
        parts = []
        for group in drawn:
            models = len(trees.leaves(group)[0])
            own = trees.map(lambda x, n=models: x.expand(n, *x.shape), entry.opt_params)
            with torch.no_grad():
                parts.append(measure(family, entry.optimizer, own, at, group))
        return trees.map(lambda *xs: torch.cat(xs).double().cpu(), *parts)

    entries = {name: _Entry(name, "contender", *pair) for name, pair in contenders.items()}
    entries |= {name: tuned(baseline, known.get(name)) for name, baseline in chosen.items()}
    measured = {name: measured_with(entry) for name, entry in entries.items()}
    counted = reference if reference in measured else None
    level = None if counted is None else _level(measured[counted])
    outcomes = {k: _outcome(entry, measured[k], at, level) for k, entry in entries.items()}
    return Evaluation(outcomes, num_steps, num_seeds, seed, counted)


def _level(found: Measured) -> float:
    """Mean final training loss of the seeds that did not diverge; NaN, which is never reached."""
    losses = final_loss(found.train)
    return float(losses[found.train.isfinite().all(-1)].mean())


def _outcome(entry: _Entry, found: Measured, at: list[int], level: float | None) -> Outcome:
    diverged = ~found.train.isfinite().all(-1) | ~found.final.isfinite()

    def unless(values: Tensor, instead: float) -> Tensor:
        return torch.where(diverged, instead, values)

    return Outcome(
        label=entry.label,
        role=entry.role,
        train_loss=unless(final_loss(found.train), torch.inf),
        held_out_loss=unless(found.final, torch.inf),
        metrics={k: unless(v, torch.nan) for k, v in found.metrics.items()},
        steps=None if level is None else unless(steps_to_reach(found.train, level), torch.inf),
        diverged=diverged,
        train=band(found.train),
        held_out=band(found.held_out, at),
        search=entry.search,
        lr=entry.lr,
        curves=Curves(found.train, found.held_out),
    )


def _check(
    contenders: Mapping[str, Any],
    chosen: Mapping[str, Baseline],
    rates: Mapping[str, Any],
    num_steps: int,
    num_seeds: int,
    chunk_size: int | None,
) -> None:
    if num_seeds < 2:
        raise ValueError(f"num_seeds must be at least 2 (for an interval), got {num_seeds}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}")
    if not contenders and not chosen:
        raise ValueError("there is nothing to evaluate: give contenders, baselines or both")
    for name, pair in contenders.items():
        if not isinstance(pair, tuple) or len(pair) != 2 or isinstance(pair, Optimizer):
            raise TypeError(
                f"contender {name!r} must be a pair (optimizer, opt_params), got a "
                f"{type(pair).__name__}; opt_params of a hand-made optimizer are {{}}"
            )
        check_optimizer_type(pair[0], f"the optimizer of contender {name!r}")
    twice = [name for name in contenders if name in chosen]
    if twice:
        raise ValueError(
            f"{', '.join(twice)} is both a contender and a baseline: rename the contender"
        )
    unused = [name for name in rates if name not in chosen]
    if unused:
        raise ValueError(f"rates are given for {', '.join(unused)}, which is no baseline here")
