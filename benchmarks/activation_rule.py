"""A rule that reads activations and no gradients, meta-trained on digits and tried on new tasks.

The claim: an optimizer that gets activations (`hebbian_mlp`, ``needs={"activations"}``) can be
meta-trained like any other, and what it has learned trains networks of widths it never met, to an
accuracy on held-out images far above chance, above its untrained start, and above the same rule
when only the last layer learns (so hidden layers learn by it too). Beside it: SGD with momentum and
Adam with backpropagation, their rates tuned; they may be better.

Meta-training: truncated backpropagation through 20 steps of trainings of 40, 80 and 200; the inner
trainings see training images, the meta-loss is the logarithm of the loss on validation images.
Comparison: 200 steps of batch 128 from fresh seeds, on test images, which neither has seen.

Run: ``python benchmarks/activation_rule.py [--quick] [--json PATH] [--weights PATH]``, about six
minutes of CPU time on one thread.
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

import fmeta
from fmeta import evaluate, optimizers, pretrained
from fmeta.estimators import truncated
from fmeta.random import fold_in
from fmeta.tasks import digits, mixture

EVALUATION = 5_000_001  # seed of the comparison
OUTER_STEPS, OUTER_LR = 300, 0.02
TRAINED_ON = {
    "MLP 64-24-10": digits((24,), batch_size=64),
    "MLP 64-16-16-10": digits((16, 16), batch_size=64),
    "MLP 64-16-10, tanh": digits((16,), "tanh", batch_size=64),
}
TRIED_ON = {
    "MLP 64-24-10 (met)": (24,),
    "MLP 64-64-10 (new width)": (64,),
    "MLP 64-48-24-10 (new widths)": (48, 24),
    "MLP 64-32-32-32-10 (new depth)": (32, 32, 32),
}
LEARNED, UNTRAINED, LAST = "meta-trained", "untrained", "last layer alone"


def log_loss(losses: Any, evals: torch.Tensor, t: Any, horizon: Any) -> torch.Tensor:
    """Each step's logarithm of the loss on validation images."""
    return torch.log(evals.clamp(1e-3, 1e3))


def meta_train(seed: int, steps: int) -> tuple[Any, Any]:
    """Weights at the start, and learned."""
    rule = optimizers.hebbian_mlp()
    start = rule.init(fold_in(seed))
    estimator = truncated(
        rule,
        mixture(list(TRAINED_ON.values())),
        num_tasks=9,
        horizon=(40, 80, 200),
        truncation=20,
        eval_split="validation",
        meta_loss=log_loss,
    )
    outer = fmeta.chain(fmeta.clip_by_global_norm(1.0), evaluate.cosine(optimizers.adam(OUTER_LR)))

    def show(metrics: dict[str, Any]) -> None:
        if metrics["step"] % max(1, steps // 10) == 0:
            print(f"outer step {metrics['step']}: meta-loss {metrics['meta_loss']:.3f}", flush=True)

    found = fmeta.meta_train.run(
        estimator, start, outer=outer, num_steps=steps, seed=seed, on_step=show
    )
    return start, found.meta_params


def last_layer_alone(widths: tuple[int, ...]) -> fmeta.Optimizer:
    """The rule where hidden layers stay as they began."""
    last = (f"w{len(widths)}", f"b{len(widths)}")
    return fmeta.masked(optimizers.hebbian_mlp(), lambda path, p: path in last)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--weights", type=Path, metavar="PATH", help="also save the weights there")
    parser.add_argument("--seed", type=int, default=0, help="of meta-training")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)

    began = time.process_time()
    start, weights = meta_train(args.seed, 3 if args.quick else OUTER_STEPS)
    seconds = time.process_time() - began
    print(f"meta-training: {seconds:.0f} s of CPU time")
    if args.weights is not None:
        pretrained.save(args.weights, "hebbian_mlp", weights)

    rule = optimizers.hebbian_mlp()
    rows, values = [], {}
    tried = dict(list(TRIED_ON.items())[:1]) if args.quick else TRIED_ON
    for name, widths in tried.items():
        found = evaluate.run(
            digits(widths),
            {
                LEARNED: (rule, weights),
                UNTRAINED: (rule, start),
                LAST: (last_layer_alone(widths), weights),
            },
            num_steps=10 if args.quick else 200,
            num_seeds=3 if args.quick else 16,
            seed=EVALUATION,
            baselines=("sgd", "adam"),
            tune_seeds=2,
            held_out_points=5,
        )
        values[name] = {
            other: {q: found.values(other, q).tolist() for q in ("accuracy", "held_out_loss")}
            for other in found.outcomes
        }
        for other, outcome in found.outcomes.items():
            accuracy = found.summary(other, "accuracy")
            row: dict[str, Any] = {
                "task": name,
                "rule": outcome.label,
                "held-out loss": found.summary(other, "held_out_loss").median,
                "accuracy": f"{accuracy.mean:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]",
                "meta-trained minus this": "",
                "diverged": int(outcome.diverged.sum()),
            }
            if other != LEARNED:
                gain = found.paired(LEARNED, other, "accuracy")
                row["meta-trained minus this"] = (
                    f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
                )
            rows.append(row)
        print(table(rows[-len(found.outcomes) :]) + "\n", flush=True)
    print("Loss: median over seeds. Accuracy on test images (chance: 0.1) and paired differences:")
    print(f"mean [95 % interval]. {time.process_time() - began:.0f} s of CPU time in all.")
    finish(
        args.json,
        {
            "rows": rows,
            "values": values,
            "seconds": seconds,
            "seed": args.seed,
            "outer_steps": OUTER_STEPS,
            "environment": environment(),
        },
    )


if __name__ == "__main__":
    main()
