"""A rule learned as a policy and by short truncated unrolls, on the tasks of Li and Malik.

The claim to be tried: with the same compute, an optimizer that was trained as a policy
(`score_function`, whole trainings of 40 steps with noise in every step) stays stable on horizons 10
times longer, and recovers from perturbed parameters better, than the same rule trained by short
truncated unrolls. The rule is an LSTM of 8 units on each coordinate, the tasks are
`logistic_regression`, `robust_regression` and `small_net` with all points in a batch.

Ways to train it, each for the same CPU time, on each task anew, from the same initial weights, with
the same outer optimizer:

- "policy": REINFORCE, baseline from the other rollouts of a task;
- "truncated 5 / 40": backpropagation through 5 steps of trainings that go on to 40;
- "unrolls of 5": backpropagation through whole trainings of 5 steps.

Beside them the untrained rule, and SGD and Adam with rates tuned for 40 steps of the same family.
All are run on the same new tasks. "at 40", "at 400": the loss there, mean of 5 steps; "drift": the
difference, above 0 where going on did harm; "kicked": 40 steps after normal noise of deviation 2
was added to the parameters of step 40, where the hidden state went on. Intervals are over tasks
(95 %, paired where differences are told); with ``--meta-seeds`` above 1 each way is meta-trained
so often, and the losses of a task are the mean over these.

Run: ``python benchmarks/policy_optimizer.py [--quick] [--figure PATH] [--json PATH]``, 10 minutes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from _timing import environment, finish, table
from torch import Tensor

import fmeta
from fmeta import evaluate, optimizers, trees
from fmeta.estimators import Estimator, score_function, truncated
from fmeta.evaluate import paired_difference
from fmeta.plot._figure import INK, MUTED, PALETTE, grid_of_axes, log_scale, write
from fmeta.random import fold_in
from fmeta.tasks import (
    TaskFamily,
    logistic_regression,
    loss_of_task,
    robust_regression,
    sample_task,
    small_net,
    stack_tasks,
)

FAMILIES = {
    "logistic regression": logistic_regression(),
    "robust regression": robust_regression(),
    "small net": small_net(),
}
RULE = optimizers.lstm(8, 1)
HORIZON, LONGER, KICK = 40, 400, 2.0
NEW_TASKS, KICKS, TUNING = 7_000_001, 7_000_002, 7_000_003  # seeds
POLICY, PIECES, SHORT = "policy", "truncated 5 / 40", "unrolls of 5"
UNTRAINED, SGD, ADAM = "untrained", "tuned SGD", "tuned Adam"
QUANTITIES = ("at 40", "at 400", "drift", "kicked")
Contender = tuple[fmeta.Optimizer, Any]


def ways(family: TaskFamily) -> dict[str, Estimator]:
    pieces: dict[str, Any] = {"num_tasks": 32, "truncation": 5}
    return {
        POLICY: score_function(
            RULE,
            family,
            num_tasks=32,
            num_rollouts=8,
            horizon=HORIZON,
            std=1.0,
            relative=True,
            baseline="rollouts",
        ),
        PIECES: truncated(RULE, family, horizon=HORIZON, **pieces),
        SHORT: truncated(RULE, family, horizon=5, **pieces),
    }


def meta_train(estimator: Estimator, start: Any, seed: int, seconds: float) -> tuple[Any, int]:
    """Weights after so much CPU time, and the number of outer steps that were made in it."""

    def outer(left: float) -> fmeta.Optimizer:
        """Adam; its rate falls with what is left of the time."""
        return fmeta.chain(fmeta.clip_by_global_norm(1.0), optimizers.adam(0.02 * left))

    own = outer(1.0).init()
    weights, state, hidden = start, estimator.init(start, seed), outer(1.0).init_hidden(own, start)
    began, steps = time.process_time(), 0
    while (left := 1 - (time.process_time() - began) / seconds) > 0:
        found, state = estimator.estimate(weights, state)
        if all(bool(g.isfinite().all()) for g in trees.leaves(found.grads)):
            weights, hidden = outer(left).step(own, weights, found.grads, hidden)
        steps += 1
    return weights, steps


def train(contender: Contender, family: TaskFamily, tasks: int, steps: int) -> tuple[Tensor, Any]:
    """Losses of trainings of ``steps``, and of 40 steps after a kick at 40: ``(tasks, steps)``."""
    rule, weights = contender
    drawn = stack_tasks([sample_task(family, steps, NEW_TASKS, i) for i in range(tasks)])
    kicks = trees.stack([_kick(family, i) for i in range(tasks)])
    loss_fn = loss_of_task(family)

    def one(config: Any, params: Any, batches: Any, kick: Any) -> tuple[Tensor, Tensor]:
        def go_on(params: Any, batches: Any, hidden: Any) -> fmeta.Run:
            return fmeta.unroll(
                rule,
                loss_fn,
                weights,
                params,
                batches,
                loss_args=(config,),
                hidden=hidden,
                num_steps=steps,
            )

        first, rest = (
            trees.map(lambda x, part=part: x[part], batches)
            for part in (slice(HORIZON), slice(HORIZON, None))
        )
        run = go_on(params, first, None)
        plain = go_on(run.params, rest, run.hidden)
        thrown = trees.map(lambda p, z: p + z, run.params, kick)
        kicked = go_on(thrown, trees.map(lambda x: x[:HORIZON], rest), run.hidden)
        return torch.cat([run.losses, plain.losses]), kicked.losses

    with torch.no_grad():
        found = torch.vmap(one)(drawn.config, drawn.model_params, drawn.batches, kicks)
    return found[0], found[1]


def _kick(family: TaskFamily, task: int) -> Any:
    generator = fold_in(KICKS, task)
    params = sample_task(family, 1, NEW_TASKS, task).model_params
    return trees.map(lambda p: KICK * torch.randn(p.shape, generator=generator), params)


def quantities(losses: Tensor, kicked: Tensor) -> dict[str, Tensor]:
    """Of each task, ``(tasks,)``."""
    early, late = losses[:, HORIZON - 5 : HORIZON].mean(1), losses[:, -5:].mean(1)
    return dict(zip(QUANTITIES, (early, late, late - early, kicked[:, -5:].mean(1)), strict=True))


def tuned(family: TaskFamily, build: Callable[[Any], Any], quick: bool) -> tuple[Contender, float]:
    found = evaluate.search_rates(
        family,
        build,
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        num_steps=HORIZON,
        num_seeds=4 if quick else 64,
        seed=TUNING,
        held_out="train",
        final_batches=1,
    )
    return (build(found.rate), ()), found.rate


def contenders(
    family: TaskFamily, seeds: range, seconds: float, quick: bool
) -> tuple[dict[str, list[Contender]], dict[str, str]]:
    """By name, one for each meta-training; and what is to be said of them."""
    found: dict[str, list[Contender]] = {}
    notes: dict[str, str] = {}
    for name, estimator in ways(family).items():
        pairs = [meta_train(estimator, RULE.init(fold_in(seed)), seed, seconds) for seed in seeds]
        found[name] = [(RULE, weights) for weights, _ in pairs]
        notes[name] = "/".join(str(steps) for _, steps in pairs) + " outer steps"
    found[UNTRAINED] = [(RULE, RULE.init(fold_in(seed))) for seed in seeds]
    notes[UNTRAINED] = ""
    for name, build in ((SGD, optimizers.sgd), (ADAM, optimizers.adam)):
        contender, rate = tuned(family, build, quick)
        found[name], notes[name] = [contender], f"rate {rate:.3g}"
    return found, notes


def rows_of(task: str, values: dict[str, dict[str, Tensor]], notes: dict[str, str]) -> list[Any]:
    """Means, and how far the policy is below each other one: ``policy - it``, with its interval."""
    rows = []
    for name, own in values.items():
        row: dict[str, Any] = {"task": task, "rule": name, "meta-training": notes[name]}
        for q in QUANTITIES:
            row[q] = f"{float(own[q].mean()):.3f}"
            if name != POLICY:
                mean, low, high = paired_difference(values[POLICY][q], own[q])
                row[q] += f" ({mean:+.3f} [{low:+.3f}, {high:+.3f}])"
        rows.append(row)
    return rows


def draw(path: Path, curves: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> None:
    figure, axes = grid_of_axes(2 * len(curves))
    names = (POLICY, PIECES, SHORT, SGD, ADAM)
    colours = dict(zip(names, (*PALETTE[:3], INK, MUTED), strict=True))
    for i, (task, by_name) in enumerate(curves.items()):
        whole, after = axes[i], axes[len(curves) + i]
        for name, colour in colours.items():
            for axis, losses in zip((whole, after), by_name[name], strict=True):
                mean = losses.mean(0)
                axis.plot(range(1, len(mean) + 1), mean, color=colour, lw=1.4, label=name)
        whole.axvline(HORIZON, color="0.6", lw=0.8, ls=":")
        whole.set(title=task, xlabel="step (dotted: the longest that was learned from)")
        after.set(title=f"{task}, kicked at step {HORIZON}", xlabel="steps after the kick")
        log_scale(whole, "x")
        for axis in (whole, after):
            axis.set_ylabel("loss, mean over tasks")
            log_scale(axis, "y")
    axes[0].legend(fontsize=8)
    write(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw them into this .png file")
    parser.add_argument("--seconds", type=float, default=50.0, help="CPU time of a meta-training")
    parser.add_argument("--meta-seeds", type=int, default=1, help="meta-trainings of each way")
    parser.add_argument("--seed", type=int, default=0, help="of the first of them")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = 0.5 if args.quick else args.seconds
    seeds = range(args.seed, args.seed + (1 if args.quick else args.meta_seeds))
    tasks, steps = (4, 2 * HORIZON) if args.quick else (128, LONGER)
    began = time.process_time()
    rows, all_values, curves = [], {}, {}
    for task, family in FAMILIES.items():
        found, notes = contenders(family, seeds, seconds, args.quick)
        runs = {
            name: [train(one, family, tasks, steps) for one in several]
            for name, several in found.items()
        }
        # Of each task, the mean over meta-trainings.
        curves[task] = {
            name: (
                torch.stack([r[0] for r in several]).mean(0),
                torch.stack([r[1] for r in several]).mean(0),
            )
            for name, several in runs.items()
        }
        values = {name: quantities(*pair) for name, pair in curves[task].items()}
        all_values[task] = {
            name: {q: x.tolist() for q, x in own.items()} for name, own in values.items()
        }
        rows += rows_of(task, values, notes)
        print(table(rows[-len(found) :]) + "\n", flush=True)
    print("In brackets: the policy minus this one, mean and 95 % interval over the same tasks.")
    print(f"{tasks} tasks, {time.process_time() - began:.0f} s of CPU time in all.")
    if args.figure is not None:
        draw(args.figure, curves)
    finish(
        args.json,
        {
            "rows": rows,
            "values": all_values,
            "seconds": seconds,
            "meta_seeds": list(seeds),
            "environment": environment(),
        },
    )


if __name__ == "__main__":
    main()
