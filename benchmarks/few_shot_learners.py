"""Every few-shot learner under one budget: 5-way 1-shot on letters of scripts it never saw.

Each learner is meta-trained on the same number of episodes of `glyphs`, with the same network, the
same outer optimizer and the defaults of ``fmeta fewshot``, and then tested on the same 1,000 test
episodes. Accuracies have 95 % intervals over episodes; differences to `maml` are paired. Seconds
are of CPU time: episodes cost the learners differently.

A run that was stopped goes on where it was: each learner's run is in ``FOLDER/<learner>``.

Run: ``python benchmarks/few_shot_learners.py --folder runs/few_shot [--learners maml snail ...]
[--outer-steps N] [--quick] [--json PATH]``; hours with all learners.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from _timing import environment, finish, table

from fmeta.evaluate import paired_difference
from fmeta.fewshot import FewShotConfig, few_shot
from fmeta.fewshot._config import LEARNERS


def run(learner: str, args: argparse.Namespace) -> dict[str, Any]:
    """Results of one learner, from its folder if it has been there before."""
    config = FewShotConfig(
        learner=learner,
        out=str(args.folder),
        name=learner,
        outer_steps=args.outer_steps,
        patience=None,
        baselines=learner == "maml",
        resume=(args.folder / learner).exists(),
        smoke=args.quick,
    )
    spent = args.folder / f"{learner}.seconds"
    before, began = float(spent.read_text()) if spent.exists() else 0.0, time.process_time()
    try:
        return few_shot(config, on_phase=lambda line: print(f"{learner}: {line}", flush=True))
    finally:
        spent.write_text(f"{before + time.process_time() - began:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--learners", nargs="+", default=list(LEARNERS), choices=list(LEARNERS))
    parser.add_argument("--outer-steps", type=int, default=400)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for learner in args.learners:
        results = run(learner, args)
        for name, row in results["scores"].items():
            found[name] = {
                **row,
                "seconds": float((args.folder / f"{learner}.seconds").read_text()),
                "outer_steps": results["training"]["outer_steps"],
            }
    compared = "maml, meta-trained"
    rows = []
    for name, row in sorted(found.items(), key=lambda item: -item[1]["mean"]):
        apart = ""
        if name != compared and compared in found:
            pair = [torch.tensor(found[k]["episodes"]) for k in (name, compared)]
            mean, low, high = (100 * x for x in paired_difference(*pair))
            apart = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append(
            {
                "learner": name,
                "accuracy, %": f"{100 * row['mean']:.1f} ± {100 * row['half_interval']:.1f}",
                f"minus {compared}": apart,
                "CPU s": f"{row['seconds']:.0f}" if name.endswith("meta-trained") else "",
            }
        )
    print(table(rows))
    finish(args.json, {"environment": environment(), "learners": found})


if __name__ == "__main__":
    main()
