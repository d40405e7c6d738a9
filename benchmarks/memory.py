"""What an unroll of a language model holds: within 8 GiB, in mixed mode, and as planned.

By default: a language model of 20 million parameters, meta-trained by second order within 8 GiB.
100 inner steps of a decoder-only transformer, in which a learned rule updates every parameter; the
meta-gradient is that of the mean loss with respect to the rule's weights, exact (second order).
Each rule runs in a process of its own, whose peak of resident memory is printed: all of it, with
interpreter and libraries. What makes it fit: binomial checkpointing (``checkpoint=``), the model's
gradient recomputed (``recompute="gradient"``) and the rule in chunks (`fmeta.chunked`).

``--mixed``: smaller language models under ``checkpoint="sqrt"``, plain, in mixed mode and with
other recomputation; resident memory beyond what a short unroll left, and CPU time, each in
processes of their own. ``--plan``: what `fmeta.plan_memory` says beside such a measurement.

    python benchmarks/memory.py [--mixed | --plan] [--quick] [--json PATH]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import _mixed_mode
import _planned_memory
import _timing
import torch
from _language_model import language_model

import fmeta
from fmeta import trees

GIB = 2**30
BAR = 8 * GIB
# For each rule: how it is built, snapshots kept.
RULES: dict[str, tuple[Any, int]] = {
    "linear": (lambda: fmeta.optimizers.linear(0.02), 15),
    "normalized_mlp": (lambda: fmeta.optimizers.normalized_mlp(2e-4, vectors="rule"), 6),
}
SIZES = {"vocabulary": 8192, "width": 512, "blocks": 5, "length": 32}
QUICK = {"vocabulary": 512, "width": 128, "blocks": 2, "length": 32}
BATCH = 2
CHUNK = 2**16


def measure(name: str, quick: bool) -> dict[str, Any]:
    """The meta-gradient of one rule, in this process."""
    torch.set_num_threads(1)
    steps = 20 if quick else 100
    sizes = QUICK if quick else SIZES
    build, snapshots = RULES[name]
    params, loss_fn = language_model(**sizes, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    tokens = text(steps, sizes["vocabulary"], sizes["length"] + 1, generator)
    rule = fmeta.chunked(build(), CHUNK)
    theta = trees.map(lambda x: x.requires_grad_(), rule.init())
    before, start = peak(), time.process_time()
    run = fmeta.unroll(
        rule, loss_fn, theta, params, tokens, checkpoint=snapshots, recompute="gradient"
    )
    forward = time.process_time() - start
    run.losses.mean().backward()
    grads = [x.grad for x in trees.leaves(theta)]
    return {
        "rule": name,
        "parameters": sum(p.numel() for p in params.values()),
        "steps": steps,
        "snapshots": snapshots,
        "before": before,
        "peak": peak(),
        "forward": forward,
        "seconds": time.process_time() - start,
        "first loss": run.losses[0].item(),
        "last loss": run.losses[-1].item(),
        "gradient": sum(g.square().sum().item() for g in grads) ** 0.5,
    }


def text(steps: int, vocabulary: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Token numbers ``(steps, BATCH, length)``; frequencies fall as 1 / rank, as those of words."""
    ranks = torch.rand(steps, BATCH, length, generator=generator) * torch.tensor(vocabulary).log()
    return (ranks.exp().long() - 1).clamp(0, vocabulary - 1)


def peak() -> int:
    """Most bytes of this process that were ever resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_process(what: str, *arguments: Any) -> dict[str, Any]:
    """The result of one of `MEASURES` in a fresh process."""
    command = [sys.executable, __file__, "--measure", json.dumps([what, *arguments])]
    # What is timed runs as anything does; what is measured in bytes, where memory that was freed
    # goes back to the system at once (which takes time).
    env = dict(os.environ) if what in ("rule", "mixed, timed") else _timing.one_thread()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


MEASURES = {
    "rule": measure,
    "mixed": _mixed_mode.measure,
    "mixed, timed": _mixed_mode.measure,
    "plan": _planned_memory.measure,
}


def main() -> None:
    options = _timing.arguments(__doc__, "mixed", "plan")
    name, run = "memory", rules
    if options.mixed:
        name, run = "memory --mixed", _mixed_mode.compare
    elif options.plan:
        name, run = "memory --plan", _planned_memory.compare
    results = run(in_process, options.quick)
    _timing.finish(
        options.json,
        {"benchmark": name, "environment": _timing.environment(), "results": results},
    )


def rules(in_process: Callable[..., dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """The language model of 20 million parameters."""
    results, rows = [], []
    for name in RULES:
        found = in_process("rule", name, quick)
        results.append(found)
        rows.append(
            {
                "rule": name,
                "parameters": f"{found['parameters'] / 1e6:.1f}M",
                "steps": found["steps"],
                "snapshots": found["snapshots"],
                "peak GiB": found["peak"] / GIB,
                "CPU s": found["seconds"],
                "of it forward": found["forward"],
                "loss": f"{found['first loss']:.2f} to {found['last loss']:.2f}",
                "|meta-gradient|": found["gradient"],
                "verdict": "" if quick else ("bar met" if found["peak"] <= BAR else "no"),
            }
        )
        print(f"{name}: {found['peak'] / GIB:.2f} GiB, {found['seconds']:.0f} s", flush=True)
    print("second order, every parameter updated by the rule; bar: 8 GiB resident, all told")
    print(_timing.table(rows))
    return results


if __name__ == "__main__":
    if "--measure" in sys.argv:
        what, *arguments = json.loads(sys.argv[-1])
        print(json.dumps(MEASURES[what](*arguments)))
    else:
        main()
