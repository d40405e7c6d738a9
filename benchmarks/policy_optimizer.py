"""A rule learned as a policy and by short truncated unrolls, on the tasks of Li and Malik.

The claim to be tried: with the same compute, an optimizer that was trained as a policy
(`score_function`, whole trainings of 40 steps with noise in every step) stays stable on horizons 10
times longer, and recovers from perturbed parameters better, than the same rule trained by short
truncated unrolls. The rule is a network 6-16-1 on each coordinate that sees the gradient and two
momenta of it (as theirs sees the recent past), the tasks are `logistic_regression`,
`robust_regression` and `small_net` with all points in a batch.

Ways to train it, each for the same CPU time, step by step in turn, on each task anew, from the same
initial weights, with the same outer optimizer:

- "policy": REINFORCE, baseline from the other rollouts of a task. The steps' noise falls while
  meta-training goes on, from a deviation of 0.3 to 0.05;
- "truncated 5 / 40": backpropagation through 5 steps of trainings that go on to 40;
- "unrolls of 5": backpropagation through whole trainings of 5 steps.

Beside them the untrained rule, and SGD and Adam with rates tuned for 40 steps of the same family.
All are run, without noise, on the same new tasks. "at 40", "at 400": the loss there, mean of 5
steps; "drift": the difference, above 0 where going on did harm; "worst": the largest loss of steps
41 to 400; "kicked": 40 steps after normal noise of deviation 2 was added to the parameters of step
40, where the hidden state went on; "kicked hard": the same with 8. Intervals are over tasks (95 %,
paired where differences are told); with ``--meta-seeds`` above 1 each way is meta-trained so often,
and the losses of a task are the mean over these.

Run: ``python benchmarks/policy_optimizer.py [--quick] [--figure PATH] [--json PATH]``, 3 minutes.
In parts: ``--folder runs/policy`` keeps what was meta-trained and goes on from there; ``--only
"small net"`` leaves out the other tasks.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
HORIZON, LONGER = 40, 400
KICKS = {"kicked": 2.0, "kicked hard": 8.0}
NOISE = (0.3, 0.05)  # deviation of the policy's steps when meta-training begins, and at its end
RATES = {"policy": 0.08, "truncated 5 / 40": 0.02, "unrolls of 5": 0.02}  # of the outer optimizer
NEW_TASKS, OF_KICKS, TUNING = 7_000_001, 7_000_002, 7_000_003  # seeds
POLICY, PIECES, SHORT = RATES
UNTRAINED, SGD, ADAM = "untrained", "tuned SGD", "tuned Adam"
QUANTITIES = ("at 40", "at 400", "drift", "worst", *KICKS)
Contender = tuple[fmeta.Optimizer, Any]


class Network:
    """``p += 0.3 (w1 tanh(w0 x + b0) + b1)``, x of a coordinate's gradient and two momenta.

    As a policy it needs no derivatives through its hidden state, which nothing learned acts on.
    """

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        def uniform(inputs: int, *shape: int) -> Tensor:
            bound = inputs**-0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        return {
            "w0": uniform(6, 6, 16),
            "b0": uniform(6, 16),
            "w1": uniform(16, 16),
            "b1": uniform(16, 1),
        }

    def init_hidden(self, weights: Any, param: Tensor) -> dict[str, Tensor]:
        return {"fast": torch.zeros_like(param), "slow": torch.zeros_like(param)}

    def update(self, weights: Any, param: Tensor, grad: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        hidden = {
            "fast": torch.lerp(grad, hidden["fast"], 0.5),
            "slow": torch.lerp(grad, hidden["slow"], 0.9),
        }
        seen = torch.stack([grad, hidden["fast"], hidden["slow"]])
        # Linear in what is small, a logarithm of what is large, with two ideas of small.
        x = torch.cat([torch.asinh(seen), torch.asinh(100 * seen) / 5])
        inner = torch.tanh(x @ weights["w0"] + weights["b0"])
        return 0.3 * (inner @ weights["w1"] + weights["b1"][0]), hidden


RULE = fmeta.coordinatewise(Network())


def ways(family: TaskFamily) -> dict[str, Estimator]:
    """All of meta-parameters ``{"rule": weights, "std": number}``, of which the rule is learned."""
    pieces: dict[str, Any] = {"num_tasks": 32, "truncation": 5, "bind": rule_of}
    return {
        POLICY: score_function(
            RULE,
            family,
            num_tasks=8,
            num_rollouts=8,
            horizon=HORIZON,
            std=lambda meta, config: meta["std"],
            baseline="rollouts",
            recurrent=False,
            bind=rule_of,
        ),
        PIECES: truncated(RULE, family, horizon=HORIZON, **pieces),
        SHORT: truncated(RULE, family, horizon=5, **pieces),
    }


def rule_of(meta: Any, config: Any) -> tuple[Any, None]:
    return meta["rule"], None


class MetaTraining:
    """One that goes on for so much CPU time, an outer step at a time."""

    def __init__(self, estimator: Estimator, rate: float, start: Any, seed: int, seconds: float):
        self.estimator, self.rate, self.seconds = estimator, rate, seconds
        self.weights, self.steps, self.used = start, 0, 0.0
        self.state = estimator.init(self.meta_params(), seed)
        outer = self.outer()
        self.own = outer.init()
        self.hidden = outer.init_hidden(self.own, start)

    @property
    def left(self) -> float:
        """Share of the time."""
        return max(0.0, 1 - self.used / self.seconds)

    def meta_params(self) -> Any:
        most, least = NOISE
        return {"rule": self.weights, "std": torch.tensor(least * (most / least) ** self.left)}

    def outer(self) -> fmeta.Optimizer:
        """Adam; its rate falls with what is left of the time."""
        adam = optimizers.adam(self.rate * self.left)
        return fmeta.chain(fmeta.clip_by_global_norm(1.0), adam)

    def go_on(self) -> None:
        began = time.process_time()
        found, self.state = self.estimator.estimate(self.meta_params(), self.state)
        grads = found.grads["rule"]
        if all(bool(g.isfinite().all()) for g in trees.leaves(grads)):
            self.weights, self.hidden = self.outer().step(
                self.own, self.weights, grads, self.hidden
            )
        self.steps += 1
        self.used += time.process_time() - began


class Trained(NamedTuple):
    weights: dict[str, Any]  # by way
    steps: dict[str, int]  # outer steps made


def meta_train(family: TaskFamily, seed: int, seconds: float, kept: Path | None) -> Trained:
    """All ways, in turn: who has used the least time goes on."""
    if kept is not None and kept.exists():
        return Trained(**torch.load(kept, weights_only=True))
    start = RULE.init(fold_in(seed))
    trainings = {
        name: MetaTraining(estimator, RATES[name], start, seed, seconds)
        for name, estimator in ways(family).items()
    }
    while (next_one := min(trainings.values(), key=lambda x: x.used)).left > 0:
        next_one.go_on()
    trained = Trained(
        {name: x.weights for name, x in trainings.items()},
        {name: x.steps for name, x in trainings.items()},
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(trained._asdict(), kept)
    return trained


def train(contender: Contender, family: TaskFamily, tasks: int, steps: int) -> dict[str, Tensor]:
    """Losses ``(tasks, steps)``: ``"plain"``, and of 40 steps after each kick at step 40."""
    rule, weights = contender
    drawn = stack_tasks([sample_task(family, steps, NEW_TASKS, i) for i in range(tasks)])
    noise = trees.stack([_normal(family, i) for i in range(tasks)])
    loss_fn = loss_of_task(family)

    def one(config: Any, params: Any, batches: Any, noise: Any) -> dict[str, Tensor]:
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
        found = {"plain": torch.cat([run.losses, go_on(run.params, rest, run.hidden).losses])}
        for name, size in KICKS.items():
            thrown = trees.map(lambda p, z, size=size: p + size * z, run.params, noise)
            soon = trees.map(lambda x: x[:HORIZON], rest)
            found[name] = go_on(thrown, soon, run.hidden).losses
        return found

    with torch.no_grad():
        found: dict[str, Tensor] = torch.vmap(one)(
            drawn.config, drawn.model_params, drawn.batches, noise
        )
    return found


def _normal(family: TaskFamily, task: int) -> Any:
    generator = fold_in(OF_KICKS, task)
    params = sample_task(family, 1, NEW_TASKS, task).model_params
    return trees.map(lambda p: torch.randn(p.shape, generator=generator), params)


def quantities(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each task, ``(tasks,)``."""
    plain = losses["plain"]
    early, late = plain[:, HORIZON - 5 : HORIZON].mean(1), plain[:, -5:].mean(1)
    kicked = [losses[name][:, -5:].mean(1) for name in KICKS]
    values = (early, late, late - early, plain[:, HORIZON:].amax(1), *kicked)
    return dict(zip(QUANTITIES, values, strict=True))


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
    family: TaskFamily, trained: dict[int, Trained], quick: bool
) -> tuple[dict[str, list[Contender]], dict[str, str]]:
    """By name, one for each meta-training; and what is to be said of them."""
    found: dict[str, list[Contender]] = {}
    notes: dict[str, str] = {}
    for name in RATES:
        found[name] = [(RULE, one.weights[name]) for one in trained.values()]
        notes[name] = "/".join(str(one.steps[name]) for one in trained.values()) + " outer steps"
    found[UNTRAINED] = [(RULE, RULE.init(fold_in(seed))) for seed in trained]
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


def told(values: Tensor, of_policy: Tensor) -> dict[str, Any]:
    """For the JSON: means, and ``policy - it`` with its interval; both ``(meta-seeds, tasks)``."""
    return {
        "mean": float(values.mean()),
        "of meta-trainings": values.mean(1).tolist(),
        "policy minus it": paired_difference(of_policy.mean(0), values.mean(0)),
    }


def draw(path: Path, curves: dict[str, dict[str, dict[str, Tensor]]]) -> None:
    figure, axes = grid_of_axes(2 * len(curves))
    names = (POLICY, PIECES, SHORT, SGD, ADAM)
    colours = dict(zip(names, (*PALETTE[:3], INK, MUTED), strict=True))
    for i, (task, by_name) in enumerate(curves.items()):
        whole, after = axes[i], axes[len(curves) + i]
        for name, colour in colours.items():
            for axis, part in ((whole, "plain"), (after, "kicked hard")):
                mean = by_name[name][part].mean(0)
                style = "--" if name in (SGD, ADAM) else "-"
                axis.plot(range(1, len(mean) + 1), mean, color=colour, lw=1.5, ls=style, label=name)
        whole.axvline(HORIZON, color="0.6", lw=0.8, ls=":")
        whole.set(title=task, xlabel="step (dotted: the longest that was learned from)")
        log_scale(whole, "x")
        size = KICKS["kicked hard"]
        after.set(title=f"{task}, kicked by {size:g} at step {HORIZON}")
        after.set_xlabel("steps after the kick")
        for axis in (whole, after):
            axis.set_ylabel("loss, mean over tasks")
            log_scale(axis, "y")
    axes[0].legend(fontsize=8)
    write(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw them into this .png file")
    parser.add_argument("--folder", type=Path, metavar="PATH", help="keeps what is meta-trained")
    parser.add_argument("--only", choices=list(FAMILIES), action="append", help="these tasks")
    parser.add_argument("--seconds", type=float, default=13.0, help="CPU time of a meta-training")
    parser.add_argument("--meta-seeds", type=int, default=1, help="meta-trainings of each way")
    parser.add_argument("--seed", type=int, default=0, help="of the first of them")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = 0.5 if args.quick else args.seconds
    seeds = range(args.seed, args.seed + (1 if args.quick else args.meta_seeds))
    tasks, steps = (4, 2 * HORIZON) if args.quick else (128, LONGER)
    began = time.process_time()
    rows, numbers, curves = [], {}, {}
    for task in args.only or FAMILIES:
        family = FAMILIES[task]
        kept = {s: args.folder and args.folder / f"{task.replace(' ', '-')}-{s}.pt" for s in seeds}
        trained = {s: meta_train(family, s, seconds, kept[s]) for s in seeds}
        found, notes = contenders(family, trained, args.quick)
        runs = {
            name: trees.stack([train(one, family, tasks, steps) for one in several])
            for name, several in found.items()
        }
        # Of each task, the mean over meta-trainings.
        curves[task] = {
            name: {part: x.mean(0) for part, x in run.items()} for name, run in runs.items()
        }
        # Quantities of each meta-training, ``(meta-seeds, tasks)``.
        each = {name: torch.vmap(quantities)(run) for name, run in runs.items()}
        values = {name: {q: x.mean(0) for q, x in own.items()} for name, own in each.items()}
        numbers[task] = {
            name: {q: told(x, each[POLICY][q]) for q, x in own.items()}
            for name, own in each.items()
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
            "numbers": numbers,
            "seconds": seconds,
            "meta_seeds": list(seeds),
            "environment": environment(),
        },
    )


if __name__ == "__main__":
    main()
