"""A rule learned as a policy and by short truncated unrolls, on the tasks of Li and Malik.

The claim to be tried: with the same compute, an optimizer that was trained as a policy
(`score_function`, whole trainings of 40 steps with noise in every step) stays stable on horizons 10
times longer, and recovers from perturbed parameters better, than the same rule trained by short
truncated unrolls. The rule is a network 6-16-1 on each coordinate that sees the gradient and two
momenta of it (as theirs sees the recent past), the tasks are `logistic_regression`,
`robust_regression` and `small_net` with all points in a batch.

Ways to train it, each for the same CPU time, step by step in turn, on each task anew, from the same
initial weights, with the same outer optimizer:

- "policy": REINFORCE, returns discounted by 0.9, baseline from the other rollouts of a task and
  the loss before the step, advantages in units of their spread at each step. The steps' noise falls
  while meta-training goes on;
- "truncated 5 / 40": backpropagation through 5 steps of trainings that go on to 40;
- "unrolls of 5": backpropagation through whole trainings of 5 steps.

In two forms: on trainings from the family's own starts, and ", scattered": in half of the
trainings normal noise is added to the start, of a deviation between 0 and 4 that is drawn anew, so
that a rule sees from where it may have to come back (Li and Malik draw starts widely too). No way
sees a kick while it is meta-trained. ``--ways`` chooses among the six; without it, the policy and
the unrolls of 5 from scattered starts, and both truncated ones from the family's own.

Beside them the untrained rule, and SGD and Adam with rates tuned for 40 steps of the same family.
All are run, without noise, on new tasks from their own starts. "at 40", "at 400": the loss there,
mean of 5 steps; "drift": the difference, above 0 where going on did harm; "worst": the largest loss
of steps 41 to 400. Kicks add normal noise of deviation 2 to the parameters of steps 10, 40 and 200,
one at a time, where the hidden state goes on: "kicked" is the loss 40 steps after, mean of 5 steps,
"recovery" the mean loss of the 40 steps, both the mean over the three kicks; "kicked hard" is the
loss 40 steps after a kick of deviation 8 at step 40; "later" and "hard, later" the loss 360 steps
after kicks of 2 and 8 at step 40, when all that is slow has come back.

Each way is meta-trained anew for each of the meta-seeds, which have initial weights, tasks of
meta-training and new tasks of their own, common to all ways: so the differences between two ways
are independent from one meta-seed to the next, and the intervals (95 %, Student's t) are over
meta-seeds, whose difference is a mean over tasks. They cover what is drawn of both.

Run: ``python benchmarks/policy_optimizer.py [--quick] [--figure PATH] [--json PATH]``, 45 minutes
of CPU. In parts: ``--folder runs/policy`` keeps what was meta-trained and measured, and goes on
from there; ``--only "small net"`` leaves out the other tasks; ``--meta-seeds``, ``--seconds``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
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
KICKED, HARD = (10, 40, 200), 40  # steps at which parameters are kicked
SIZE, HARD_SIZE = 2.0, 8.0  # deviations
SHARE, MOST = 0.5, 4.0  # of scattered starts: how many, and the largest deviation
NEW = 128  # tasks on which each meta-seed's rules are compared
# Settings, of each task the best of those tried on other tasks with another meta-seed (README.md):
# the deviation of the policy's steps when meta-training begins, and at its end,
NOISE = {
    "logistic regression": (0.5, 0.05),
    "robust regression": (0.5, 0.05),
    "small net": (1.0, 0.1),
}
# and rates of the outer optimizer.
POLICY, PIECES, SHORT = "policy", "truncated 5 / 40", "unrolls of 5"
SCATTERED = ", scattered"
BEST = POLICY + SCATTERED
RATES = {
    "logistic regression": {POLICY: 0.08, PIECES: 0.02, SHORT: 0.05, SHORT + SCATTERED: 0.05},
    "robust regression": {POLICY: 0.04, PIECES: 0.02, SHORT: 0.02, SHORT + SCATTERED: 0.02},
    "small net": {POLICY: 0.08, PIECES: 0.02, SHORT: 0.01, SHORT + SCATTERED: 0.05},
}
TASKS = {"logistic regression": 8, "robust regression": 8, "small net": 16}  # of the policy
SECONDS = {"logistic regression": 20.0, "robust regression": 20.0, "small net": 40.0}
WAYS = (BEST, SHORT, SHORT + SCATTERED, PIECES)  # those that run without being asked for
PAIRS = (  # compared: the second is what the claim is about, trained on what it was meant for,
    (BEST, SHORT),
    (BEST, SHORT + SCATTERED),  # on the same starts,
    (POLICY, SHORT),  # on the same starts, if these are the family's own,
    (BEST, PIECES),  # and trained on all phases.
    (BEST, PIECES + SCATTERED),
    (BEST, POLICY),
)
NEW_TASKS, OF_KICKS, TUNING = 7_000_001, 7_000_002, 7_000_003  # seeds
UNTRAINED, SGD, ADAM = "untrained", "tuned SGD", "tuned Adam"
QUANTITIES = (
    *("at 40", "at 400", "drift", "worst", "kicked", "recovery", "kicked hard"),
    *("later", "hard, later"),
)
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


def scattered(family: TaskFamily) -> TaskFamily:
    """The family, of which a share of the trainings begins somewhere else."""

    def init(config: Any, generator: torch.Generator) -> Any:
        params = family.init(config, generator)
        chance, size = torch.rand(2, generator=generator).tolist()
        size *= MOST * (chance < SHARE)
        return trees.map(lambda p: p + size * torch.randn(p.shape, generator=generator), params)

    return family._replace(init=init)


def ways(task: str) -> dict[str, Estimator]:
    """All of meta-parameters ``{"rule": weights, "std": number}``, of which the rule is learned."""
    family = FAMILIES[task]
    pieces: dict[str, Any] = {"num_tasks": 32, "truncation": 5, "bind": rule_of}
    found: dict[str, Estimator] = {}
    for start, own in ((SCATTERED, scattered(family)), ("", family)):
        found[POLICY + start] = score_function(
            RULE,
            own,
            num_tasks=TASKS[task],
            num_rollouts=8,
            horizon=HORIZON,
            std=lambda meta, config: meta["std"],
            discount=0.9,
            baseline="fitted_rollouts",
            normalize="step",
            recurrent=False,
            bind=rule_of,
        )
        found[PIECES + start] = truncated(RULE, own, horizon=HORIZON, **pieces)
        found[SHORT + start] = truncated(RULE, own, horizon=5, **pieces)
    return found


def rate_of(task: str, way: str) -> float:
    """Of the outer optimizer; without one of its own that for the family's own starts."""
    rates = RATES[task]
    return rates[way] if way in rates else rates[way.removesuffix(SCATTERED)]


def rule_of(meta: Any, config: Any) -> tuple[Any, None]:
    return meta["rule"], None


class MetaTraining:
    """One that goes on for so much CPU time, an outer step at a time."""

    def __init__(
        self,
        estimator: Estimator,
        rate: float,
        noise: tuple[float, float],
        start: Any,
        seed: int,
        seconds: float,
    ) -> None:
        self.estimator, self.rate, self.noise, self.seconds = estimator, rate, noise, seconds
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
        most, least = self.noise
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


def meta_train(task: str, seed: int, seconds: float, chosen: Sequence[str]) -> Trained:
    """The chosen ways, in turn: who has used the least time goes on."""
    start = RULE.init(fold_in(seed))
    trainings = {
        name: MetaTraining(estimator, rate_of(task, name), NOISE[task], start, seed, seconds)
        for name, estimator in ways(task).items()
        if name in chosen
    }
    while (next_one := min(trainings.values(), key=lambda x: x.used)).left > 0:
        next_one.go_on()
    return Trained(
        {name: x.weights for name, x in trainings.items()},
        {name: x.steps for name, x in trainings.items()},
    )


def train(
    contender: Contender, family: TaskFamily, seed: int, tasks: int, steps: int
) -> dict[str, Tensor]:
    """Losses ``(tasks, steps)`` of ``"plain"``, ``(tasks, steps after)`` of each kick."""
    rule, weights = contender
    seed += NEW_TASKS
    drawn = stack_tasks([sample_task(family, steps, seed, i) for i in range(tasks)])
    noise = trees.stack([_normal(family, seed, i) for i in range(tasks)])
    kicks = {f"kicked at {at}": (at, SIZE) for at in KICKED} | {"kicked hard": (HARD, HARD_SIZE)}
    kicks = {name: kick for name, kick in kicks.items() if kick[0] + HORIZON <= steps}
    ends = sorted({at for at, _ in kicks.values()} | {steps})
    loss_fn = loss_of_task(family)

    def one(config: Any, params: Any, batches: Any, noise: Any) -> dict[str, Tensor]:
        def go_on(params: Any, hidden: Any, first: int, last: int) -> fmeta.Run:
            part = trees.map(lambda x: x[first:last], batches)
            options = {"loss_args": (config,), "hidden": hidden, "num_steps": steps}
            return fmeta.unroll(rule, loss_fn, weights, params, part, **options)

        found, plain, hidden, at = {}, [], None, 0
        for end in ends:
            run = go_on(params, hidden, at, end)
            params, hidden, at = run.params, run.hidden, end
            plain.append(run.losses)
            for name, (when, size) in kicks.items():
                if when == end:
                    thrown = trees.map(lambda p, z, size=size: p + size * z, params, noise)
                    last = steps if end == HARD else end + HORIZON
                    found[name] = go_on(thrown, hidden, end, last).losses
        return found | {"plain": torch.cat(plain)}

    with torch.no_grad():
        losses: dict[str, Tensor] = torch.vmap(one)(
            drawn.config, drawn.model_params, drawn.batches, noise
        )
    return losses


def _normal(family: TaskFamily, seed: int, task: int) -> Any:
    generator = fold_in(OF_KICKS, seed, task)
    params = sample_task(family, 1, seed, task).model_params
    return trees.map(lambda p: torch.randn(p.shape, generator=generator), params)


def quantities(losses: dict[str, Tensor]) -> dict[str, float]:
    """Means over the tasks of a meta-seed."""
    plain = losses["plain"]
    early, late = plain[:, HORIZON - 5 : HORIZON].mean(), plain[:, -5:].mean()
    soon = {name: x[:, :HORIZON] for name, x in losses.items() if name != "plain"}
    kicked = torch.stack([x for name, x in soon.items() if name != "kicked hard"])
    found = (
        *(early, late, late - early, plain[:, HORIZON:].amax(1).mean()),
        *(kicked[..., -5:].mean(), kicked.mean(), soon["kicked hard"][:, -5:].mean()),
        *(losses[name][:, -5:].mean() for name in (f"kicked at {HARD}", "kicked hard")),
    )
    return {name: float(x) for name, x in zip(QUANTITIES, found, strict=True)}


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


class Measured(NamedTuple):
    """What is known of a task and a meta-seed.

    Attributes:
        values: by contender and quantity.
        curves: means over tasks, by contender and kind of training.
        notes: what is to be said of the meta-training.
    """

    values: dict[str, dict[str, float]]
    curves: dict[str, dict[str, Tensor]]
    notes: dict[str, str]


def measure(
    task: str,
    seed: int,
    seconds: float,
    chosen: Sequence[str],
    by_hand: dict[str, tuple[Contender, float]],
    tasks: int,
    steps: int,
    kept: Path | None,
) -> Measured:
    """All contenders of a meta-seed, on its new tasks.

    Raises:
        ValueError: what was kept is of other options.
    """
    options = {"seconds": seconds, "ways": sorted(chosen), "tasks": tasks, "steps": steps}
    if kept is not None and kept.exists():
        found_there = torch.load(kept, weights_only=True)
        if found_there.get("options") != options:
            raise ValueError(
                f"{kept} was measured with {found_there.get('options')}, not with {options}: give "
                "another --folder"
            )
        return Measured(**found_there["measured"])
    family, trained = FAMILIES[task], meta_train(task, seed, seconds, chosen)
    found: dict[str, Contender] = {name: (RULE, w) for name, w in trained.weights.items()}
    found |= {UNTRAINED: (RULE, RULE.init(fold_in(seed)))}
    found |= {name: contender for name, (contender, _) in by_hand.items()}
    notes = {name: str(n) for name, n in trained.steps.items()} | {UNTRAINED: ""}
    notes |= {name: f"rate {rate:.3g}" for name, (_, rate) in by_hand.items()}
    losses = {name: train(one, family, seed, tasks, steps) for name, one in found.items()}
    measured = Measured(
        {name: quantities(own) for name, own in losses.items()},
        {name: {k: x.mean(0) for k, x in own.items()} for name, own in losses.items()},
        notes,
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        saved = {"trained": trained._asdict(), "measured": measured._asdict()}
        torch.save({**saved, "options": options}, kept)
    return measured


def told(several: list[Measured]) -> dict[str, dict[str, Any]]:
    """By contender and quantity: the mean, and what each meta-seed has."""
    found: dict[str, dict[str, Any]] = {}
    for name in several[0].values:
        found[name] = {"meta-training": [one.notes[name] for one in several]}
        for q in QUANTITIES:
            own = [one.values[name][q] for one in several]
            found[name][q] = {"mean": sum(own) / len(own), "of meta-seeds": own}
    return found


def rows_of(task: str, numbers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, own in numbers.items():
        notes = sorted(own["meta-training"], key=lambda note: (len(note), note))  # as numbers
        row = {"task": task, "rule": name}
        row["outer steps"] = notes[0] if len(set(notes)) == 1 else f"{notes[0]} to {notes[-1]}"
        rows.append(row | {q: f"{own[q]['mean']:.3f}" for q in QUANTITIES})
    return rows


def differences(numbers: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each pair the first minus the second: mean and interval over meta-seeds."""

    def each(task: str, name: str, q: str) -> Tensor:
        return torch.tensor(numbers[task][name][q]["of meta-seeds"], dtype=torch.float64)

    return [
        {"pair": pair, "task": task, "quantity": q, "found": (mean, low, high)}
        for pair in PAIRS
        if all(name in own for name in pair for own in numbers.values())
        for task in numbers
        for q in QUANTITIES
        for mean, low, high in [paired_difference(*(each(task, name, q) for name in pair))]
    ]


def tables_of(found: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """The differences as numbers, and as words by the interval."""
    exact: dict[Any, dict[str, str]] = {}
    words: dict[Any, dict[str, str]] = {}
    for one in found:
        (first, second), (mean, low, high) = one["pair"], one["found"]
        head = {"first": first, "second": second, "task": one["task"]}
        key = tuple(head.values())
        exact.setdefault(key, dict(head))[one["quantity"]] = (
            f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
        word = "better" if high < 0 else "**worse**" if low > 0 else "level"
        words.setdefault(key, dict(head))[one["quantity"]] = word
    return {"differences": list(exact.values()), "verdicts": list(words.values())}


def draw(path: Path, curves: dict[str, list[dict[str, dict[str, Tensor]]]]) -> None:
    figure, axes = grid_of_axes(2 * len(curves))
    names = (BEST, SHORT, SHORT + SCATTERED, PIECES, SGD, ADAM)
    colours = dict(zip(names, (*PALETTE[:4], INK, MUTED), strict=True))
    first = next(iter(curves.values()))[0]
    colours = {name: colour for name, colour in colours.items() if name in first}
    for i, (task, by_seed) in enumerate(curves.items()):
        whole, after = axes[i], axes[len(curves) + i]
        for name, colour in colours.items():
            for axis, part in ((whole, "plain"), (after, f"kicked at {HARD}")):
                mean = torch.stack([own[name][part] for own in by_seed]).mean(0)
                style = "--" if name in (SGD, ADAM) else "-"
                axis.plot(range(1, len(mean) + 1), mean, color=colour, lw=1.5, ls=style, label=name)
        whole.axvline(HORIZON, color="0.6", lw=0.8, ls=":")
        whole.set(title=task, xlabel="step (dotted: the longest that was learned from)")
        after.set(title=f"{task}, kicked by {SIZE:g} at step {HARD}")
        after.set_xlabel("steps after the kick")
        for axis in (whole, after):
            axis.set_ylabel("loss, mean over tasks")
            log_scale(axis, "x")
            log_scale(axis, "y")
    axes[0].legend(fontsize=8)
    write(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw them into this .png file")
    parser.add_argument("--folder", type=Path, metavar="PATH", help="keeps what is meta-trained")
    parser.add_argument("--only", choices=list(FAMILIES), action="append", help="these tasks")
    parser.add_argument(
        "--ways", choices=list(ways("small net")), nargs="+", default=WAYS, help="to meta-train"
    )
    parser.add_argument("--seconds", type=float, help="CPU time of each meta-training")
    parser.add_argument("--meta-seeds", type=int, default=6, help="meta-trainings of each way")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = dict.fromkeys(SECONDS, 0.5) if args.quick else SECONDS
    if args.seconds:
        seconds = dict.fromkeys(SECONDS, args.seconds)
    seeds = range(args.seed, args.seed + (2 if args.quick else args.meta_seeds))
    tasks, steps = (4, 2 * HORIZON) if args.quick else (NEW, LONGER)
    began = time.process_time()
    chosen = args.only or list(FAMILIES)
    by_hand = {
        task: {
            name: tuned(FAMILIES[task], build, args.quick)
            for name, build in ((SGD, optimizers.sgd), (ADAM, optimizers.adam))
        }
        for task in chosen
    }
    found: dict[str, list[Measured]] = {task: [] for task in chosen}
    for seed in seeds:
        for task in chosen:
            kept = args.folder and args.folder / f"{task.replace(' ', '-')}-{seed}.pt"
            given = (args.ways, by_hand[task], tasks, steps, kept)
            found[task].append(measure(task, seed, seconds[task], *given))
            print(f"{task}, meta-seed {seed}: {time.process_time() - began:.0f} s", flush=True)
    numbers = {task: told(several) for task, several in found.items()}
    rows = [row for task, own in numbers.items() for row in rows_of(task, own)]
    compared = differences(numbers) if len(seeds) > 1 else []
    tables = tables_of(compared)
    print("\n" + table(rows) + "\n")
    if compared:
        print("First minus second, mean and 95 % interval over meta-seeds (below 0: better):\n")
        print(table(tables["differences"]) + "\n\nThe first, by these intervals:\n")
        print(table(tables["verdicts"]) + "\n")
    if args.figure is not None:
        draw(args.figure, {task: [one.curves for one in own] for task, own in found.items()})
    finish(
        args.json,
        {
            "rows": rows,
            "numbers": numbers,
            **tables,
            "seconds": {task: seconds[task] for task in chosen},
            "meta_seeds": list(seeds),
            "environment": environment(),
        },
    )


if __name__ == "__main__":
    main()
