"""The main job with several seeds of meta-training, on models that it never met.

The claim: `fmeta train` with its defaults learns a rule that, untuned, ends below its untrained
start and below tuned Adam, with a constant rate and with a cosine, on a width it never met; at 5
and 10 times the longest horizon of meta-training it does not end above Adam by more than a tenth.
And what becomes of it on other models. The spread is that over seeds of meta-training.

Each run is `fmeta train --seed S` and lies in FOLDER/seed-S; finished runs are not repeated. Then
the learned rules of all seeds train the same new models side by side with their untrained start and
with tuned Adam (constant, and with a cosine).

Run: ``python benchmarks/main_job.py --folder FOLDER [--quick]``, about four minutes a seed and
seven for the models.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from _timing import environment, finish, table

from fmeta import evaluate, optimizers, pretrained
from fmeta.meta_train import TrainConfig, train_on_digits
from fmeta.tasks import digits

SEED = 7_000_001  # of the comparison: not that of the job's own
BASELINES = ("adam", "adam_cosine")
MODELS: dict[str, dict[str, Any]] = {
    "MLP 64-96-10": {"widths": (96,)},
    "MLP 64-40-40-40-10, tanh": {"widths": (40, 40, 40), "activation": "tanh"},
    "CNN 8-16": {"widths": (8, 16), "model": "cnn"},
    "transformer 16-16": {"widths": (16, 16), "model": "transformer"},
}


def run_of(folder: Path, seed: int, quick: bool) -> tuple[dict[str, Any], float]:
    """Results of the run, and its wall seconds (0 for one that was finished before)."""
    there = (folder / f"seed-{seed}" / "config.json").exists()
    config = TrainConfig(out=str(folder), name=f"seed-{seed}", seed=seed, resume=there, smoke=quick)
    start = time.perf_counter()
    return train_on_digits(config), 0.0 if there else time.perf_counter() - start


def rows_of(found: evaluate.Evaluation, where: str, learned: list[str]) -> list[dict[str, Any]]:
    """One row for each rule, with its ratios to the start and to Adam."""
    rows = []
    for name in learned:
        row: dict[str, Any] = {"task": where, "rule": name}
        for quantity in ("train_loss", "held_out_loss", "accuracy"):
            row[quantity] = found.summary(name, quantity).mean
        for other in found.outcomes:
            if other in learned:
                continue
            d = found.paired(name, other, "held_out_loss", log=True)
            low, mean, high = (math.exp(x) for x in (d.low, d.mean, d.high))
            row[f"/ {found.outcomes[other].label}"] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        row["diverged"] = int(found.outcomes[name].diverged.sum())
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of meta-training")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="runs of seconds, one model")
    args = parser.parse_args()
    torch.set_num_threads(1)

    own, seconds = [], []
    for seed in range(args.seeds):
        results, took = run_of(args.folder, seed, args.quick)
        seconds.append(took)
        for length, value in results["evaluations"].items():
            one = evaluate.Evaluation.from_dict(value)
            one = one._replace(
                outcomes={
                    k: v for k, v in one.outcomes.items() if v.role == "contender" or k in BASELINES
                }
            )
            own += rows_of(one, f"seed {seed}, {length}", [next(iter(one.outcomes))])
    print("Each run's own comparison; wall seconds " + ", ".join(f"{s:.0f}" for s in seconds))
    print(table(own) + "\n")
    for length in dict.fromkeys(row["task"].split(", ")[1] for row in own):
        for column in (c for c in own[0] if c.startswith("/ ")):
            ratios = [float(r[column].split()[0]) for r in own if r["task"].endswith(length)]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{length}: held-out loss {column}, over the seeds {spread}")
    print()

    contenders, learned = {}, []
    for seed in range(args.seeds):
        rule, weights = pretrained.load(args.folder / f"seed-{seed}" / "weights.safetensors")
        learned.append(f"seed {seed}")
        contenders[learned[-1]] = (rule, weights)
    rule = optimizers.basis_mlp()
    contenders["untrained"] = (rule, rule.init(torch.Generator().manual_seed(0)))
    steps, models = (8, dict(list(MODELS.items())[:1])) if args.quick else (200, MODELS)
    others = []
    for name, options in models.items():
        found = evaluate.run(
            digits(**options, online=True),
            contenders,
            num_steps=steps,
            num_seeds=3 if args.quick else 8,
            seed=SEED,
            baselines=BASELINES,
            tune_seeds=2,
        )
        others += rows_of(found, f"{name}, {steps} steps", learned)
        print(table(others[-len(learned) :]) + "\n", flush=True)
    config = {k: str(v) for k, v in dataclasses.asdict(TrainConfig()).items()}
    finish(
        args.json,
        {
            "own": own,
            "others": others,
            "seconds": seconds,
            "config": config,
            "environment": environment(),
        },
    )


if __name__ == "__main__":
    main()
