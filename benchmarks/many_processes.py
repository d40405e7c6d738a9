"""Meta-training by several processes: particles per second, bytes an outer step, what limits it.

The claim: two processes on two cores make at least 1.7 times the particles per second of one
process of one thread, and what they exchange does not grow with the number of weights.

A particle is a pair of opposite perturbations of the rule, each through one truncation of 20 steps
of a digits MLP 64-32-10, batch 128: what ``fmeta train`` does in an outer step, without validation
and files. Several processes join through gloo on this machine. Wall-clock seconds, because waiting
counts; the best of several rounds in turns. On a machine that others use two processes get less
than two cores: "machine" is what two processes reached in the same minutes that exchange nothing
and make all the particles each, and "by CPU time" the ratio of the CPU seconds of one process to
those of the busier of two, which is the ratio on two idle cores but for the time of the exchanges
themselves. "redrawing" is the part of an outer step in which a rank draws the perturbations of all
particles.

Run: ``python benchmarks/many_processes.py [--quick]``, about four minutes.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes

import json
import socket
import subprocess
import sys
import time
from typing import Any

import torch
from _timing import arguments, environment, finish, table

import fmeta
from fmeta.distributed import Ranks, joined

TRUNCATION, HORIZON, BATCH = 20, 200, 128
BAR = 1.7
RULES = {
    "normalized_mlp": lambda: fmeta.optimizers.normalized_mlp(lr=0.01),
    "basis_mlp": fmeta.optimizers.basis_mlp,
    "adafactor_mlp, 2 x 32": lambda: fmeta.optimizers.adafactor_mlp(
        hidden_size=32, hidden_layers=2
    ),
}


def main() -> None:
    options = arguments(__doc__)
    particles, steps, rounds = (8, 2, 1) if options.quick else (32, 4, 6)
    rows, found = [], {}
    for name in list(RULES)[: 1 if options.quick else None]:
        best: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):
            for kind, size in (("one", 1), ("apart", 2), ("two", 2)):
                result = started(kind, name, size, particles, steps)
                seen = best.setdefault(kind, result)
                best[kind] = {**seen, **{k: min(seen[k], result[k]) for k in ("seconds", "cpu")}}
        one, apart, two = best["one"], best["apart"], best["two"]
        ratios = {
            "ratio": one["seconds"] / two["seconds"],
            "machine": 2 * one["seconds"] / apart["seconds"],
            "by CPU time": one["cpu"] / two["cpu"],
        }
        rows.append(
            {
                "rule": name,
                "weights": one["weights"],
                "particles/s, one": particles / one["seconds"],
                "two": particles / two["seconds"],
                **ratios,
                "redrawing %": 100 * two["noise"] / two["cpu"],
                "bytes a particle": two["sent"] / particles,
                "exchanges": two["exchanges"],
            }
        )
        found[name] = {**best, **ratios}
    print(table(rows))
    for kind in ("ratio", "by CPU time"):
        reached = [found[name][kind] for name in found]
        met = "met" if min(reached) >= BAR else "not met"
        print(f"bar, {BAR} times the particles per second, {kind}: {met} ({min(reached):.2f})")
    finish(options.json, {"environment": environment(), "found": found})


def started(kind: str, rule: str, size: int, particles: int, steps: int) -> dict[str, Any]:
    """What so many processes measured, times those of the slowest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    command = [sys.executable, __file__, "--worker", kind, rule, str(particles), str(steps)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env={**base, "RANK": str(rank)})
        for rank in range(size)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed")
    found = [json.loads(text) for text in outputs]
    return {**found[0], **{k: max(f[k] for f in found) for k in ("seconds", "cpu")}}


def worker(kind: str, name: str, particles: int, steps: int) -> None:
    """Makes outer steps and prints seconds, bytes and CPU seconds of one of them."""
    torch.set_num_threads(1)
    sent: list[int] = []

    with joined() as joint:
        ranks = Ranks.alone()
        if kind == "two":
            ranks = Ranks(
                joint.rank, joint.size, None, joint.watch, lambda kind, size: sent.append(size)
            )
        rule = RULES[name]()
        family = fmeta.tasks.digits((32,), batch_size=BATCH)
        estimator = fmeta.estimators.pes(
            rule,
            family,
            num_tasks=particles,
            horizon=HORIZON,
            truncation=TRUNCATION,
            std=0.01,
            chunk_size=32,
            ranks=ranks,
        )
        meta_params = rule.init()
        state = estimator.init(meta_params, 0)
        _, state = estimator.estimate(meta_params, state)  # records the step
        sent.clear()
        joint.wait_for_all()
        began, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            estimate, state = estimator.estimate(meta_params, state)
            meta_params = fmeta.trees.map(lambda x, g: x - 1e-4 * g, meta_params, estimate.grads)
        seconds = (time.perf_counter() - began) / steps
        used = (time.process_time() - used) / steps
        total, exchanges = sum(sent) / steps, len(sent) / steps
        noise = redrawing(meta_params, particles)
        joint.wait_for_all()
    weights = sum(x.numel() for x in fmeta.trees.leaves(meta_params))
    found = {"seconds": seconds, "cpu": used, "noise": noise, "weights": weights}
    print(json.dumps({**found, "sent": total * ranks.size, "exchanges": exchanges}))


def redrawing(meta_params: Any, particles: int) -> float:
    """Seconds to draw the perturbations of so many particles."""
    from fmeta.estimators._noise import PERTURBATION, Noise

    noise = Noise(0.01)
    names = [(0, 1, i, PERTURBATION) for i in range(particles)]
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        noise.stacked(meta_params, names)
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
