"""Bias and noise of the meta-gradient's estimators against the length of truncations.

The claim: on a noisy quadratic, whose true meta-gradient is known, `full`, `pes`, `nres` and
`es_single` are unbiased whatever the truncation, `truncated` and `es` are not and the less the
longer it is; and an estimate's noise grows with the number of perturbations that a training sees
(`pes`), more than where it keeps one (`nres`).

The task is that of Wu et al. (1803.02021): ``sum_i h_i (w_i - b_i)^2 / 2`` with eight curvatures
from 1 to 1/32 and minima that jump from step to step. Learned are a logarithmic rate for each
coordinate and a momentum, of trainings of T steps; the meta-loss is their mean loss. The truth is
the mean of `full` over many tasks.

"bias" is the norm of (mean estimate - truth) over that of the truth, with its standard error, the
mean over whole trainings with fixed meta-parameters. "noise" is the root mean square distance of an
estimate from that mean, over the norm of the truth; "noise of T steps" the same of the mean of the
T / K estimates that follow each other while each copy makes T steps. One run, no timing.

Run: ``python benchmarks/estimators.py [--quick] [--figure PATH] [--json PATH]``, 8 minutes.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from _timing import environment, finish, table
from torch import Tensor

import fmeta
from fmeta import estimators, trees
from fmeta.plot._figure import PALETTE, grid_of_axes, log_scale, write
from fmeta.tasks import TaskFamily

DOUBLE = {"dtype": torch.float64}
DIM = 8
CURVATURE = torch.logspace(0, -5, DIM, base=2, **DOUBLE)
STD = 0.01
TASKS = 64
NOISES = ("noise", "noise of T steps")
UNBIASED = ("pes", "nres", "es_single")
PIECES = ("truncated", "es", *UNBIASED)


def noisy_quadratic() -> TaskFamily:
    """Minima that jump by 0.5 around 0 with each batch; starts of norm 1 to each direction."""
    return TaskFamily(
        CURVATURE,
        lambda generator: {},
        lambda config, generator: {"w": torch.randn(DIM, generator=generator, **DOUBLE)},
        lambda config, generator, steps, split="train": (
            0.5 * torch.randn(steps, DIM, generator=generator, **DOUBLE)
        ),
        lambda data, config, p, b: (data * (p["w"] - b).square()).sum() / 2,
    )


RULE = fmeta.learn(
    fmeta.optimizers.sgd,
    {"lr": "log", "momentum": "logit"},
    lr={"w": torch.full((DIM,), 0.1, **DOUBLE)},
    momentum=torch.tensor(0.5, **DOUBLE),
)
META = RULE.init()


def vector(tree: Any) -> Tensor:
    return torch.cat([x.flatten() for x in trees.leaves(tree)])


def measure(name: str, horizon: int, truncation: int, seeds: int, rounds: int) -> dict[str, Any]:
    """Estimates of some seeds, each over ``rounds`` whole trainings after a first one."""
    options: dict[str, Any] = {"num_tasks": TASKS, "horizon": horizon}
    whole = 1 if name == "full" else horizon // truncation
    if name != "full":
        options["truncation"] = truncation
    if name in ("es", *UNBIASED):
        options["std"] = STD
    estimator = getattr(estimators, name)(RULE, noisy_quadratic(), **options)
    found = []
    for seed in range(seeds):
        state, row = estimator.init(META, seed), []
        for k in range(whole * (rounds + 1)):
            estimate, state = estimator.estimate(META, state)
            if k >= whole:  # the first trainings of staggered ones end early
                row.append(vector(estimate.grads))
        found.append(torch.stack(row))
    estimates = torch.stack(found)  # (seeds, estimates, numbers)
    mean = estimates.mean((0, 1))
    trainings = estimates.unflatten(1, (-1, whole)).mean(2)
    return {
        "mean": mean,
        "error": (estimates.mean(1).var(0).sum() / seeds).sqrt(),
        "noise": (estimates - mean).square().sum(-1).mean().sqrt(),
        "noise of T steps": (trainings - mean).square().sum(-1).mean().sqrt(),
    }


def row_of(
    name: str, truncation: int, found: dict[str, Any], truth: dict[str, Any]
) -> dict[str, Any]:
    size = truth["mean"].norm()
    error = math.hypot(float(found["error"]), float(truth["error"]))
    return {
        "estimator": name,
        "K": truncation,
        "bias": float((found["mean"] - truth["mean"]).norm() / size),
        "its standard error": error / float(size),
        **{key: float(found[key] / size) for key in NOISES},
    }


def draw(path: Path, rows: list[dict[str, Any]], horizon: int) -> None:
    figure, (left, *right) = grid_of_axes(3)
    full = next(r for r in rows if r["estimator"] == "full")
    for colour, name in zip(PALETTE, PIECES, strict=False):
        own = [r for r in rows if r["estimator"] == name]
        lengths = [r["K"] for r in own]
        line = {"color": colour, "marker": "o", "ms": 4, "lw": 1.6, "label": name}
        dashed = {"ls": "--"} if name == "es_single" else {}  # it lies on nres
        left.errorbar(
            lengths,
            [r["bias"] for r in own],
            [r["its standard error"] for r in own],
            capsize=2,
            **line,
            **dashed,
        )
        # Nothing on a log axis where a single step of truncated backpropagation is exactly 0.
        seen = [r for r in own if r["noise"] > 0]
        for axis, key in zip(right, NOISES, strict=True):
            axis.plot([r["K"] for r in seen], [r[key] for r in seen], **line, **dashed)
    left.axhline(0, color="0.3", lw=1)
    left.set(ylabel="|mean - truth| / |truth|", title="bias (with standard error)")
    titles = ("noise of one estimate", f"noise of the mean over {horizon} steps")
    for axis, key, title in zip(right, NOISES, titles, strict=True):
        axis.axhline(full[key], color="0.3", lw=1, ls=":", label="full")
        axis.set(ylabel="rms error / |truth|", title=title)
        log_scale(axis, "y")
    for axis in (left, *right):
        axis.set_xlabel(f"truncation K (trainings of {horizon} steps)")
        log_scale(axis, "x")
        axis.set_xticks([2**i for i in range(horizon.bit_length())])
    for axis in (left, right[-1]):  # in the middle it would lie on the lines
        axis.legend(fontsize=8)
    write(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw them into this .png file")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    horizon, seeds, rounds = (8, 3, 1) if args.quick else (64, 12, 6)
    start = time.process_time()
    truth = measure("full", horizon, horizon, seeds, rounds if args.quick else 40)
    rows = [row_of("full", horizon, truth, truth)]
    rows[0]["bias"], rows[0]["its standard error"] = (
        0.0,
        float(truth["error"]) / float(truth["mean"].norm()),
    )
    for name in PIECES:
        for k in range(horizon.bit_length()):
            found = measure(name, horizon, 2**k, seeds, rounds)
            rows.append(row_of(name, 2**k, found, truth))
    print(table(rows))
    print(
        f"\nT = {horizon}, {TASKS} tasks (pairs), std {STD}; bias and noise over the norm of the "
        f"truth; {time.process_time() - start:.0f} s of CPU time"
    )
    if args.figure is not None:
        draw(args.figure, rows, horizon)
    finish(args.json, {"rows": rows, "horizon": horizon, "environment": environment()})


if __name__ == "__main__":
    main()
