"""One step of `normalized_mlp` against the limits of the machine: memory and matrix products.

The claim: without gradients, in tiles that stay in cache, a step is several times as fast as in one
tile, and a third of it is its matrix products; the rest are elementwise passes through the cache.
For each coordinate (a weight of a large matrix) the step needs

- 432 FLOPs in matrix products: the network of 18 features that differ from coordinate to
  coordinate (the other 12 of the 30 are constant along rows or columns, so their part of the first
  layer is computed once for each), 8, 8 and 1 unit: ``2 * (18 * 8 + 8 * 8 + 8)``; and about 100
  more outside of them: 4 moments, the features, their squares, biases and relu;
- 44 bytes: gradient, parameter and 4 moments are read, parameter and moments are written. Since
  the features are divided by their rms over the matrix, a matrix that does not fit the cache must
  be passed more than once: 84 bytes, with g (4) for the means over rows and columns, all six (24)
  plus moments written (16) for the features' rms, all six again (24) for the network, the direction
  written (4) and, after its rms is known, read, and the parameter read and written (12).

A functional step returns new tensors: where these come from fresh pages (above 32 MB each with
glibc), the system's zeroing of pages is part of the time; ``clone`` shows how much. With
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=268435456 in the environment
glibc keeps freed memory; THP_MEM_ALLOC_ENABLE=1 (torch asks for huge pages) helps less.

CPU time of one thread, medians. Run: ``python benchmarks/normalized_mlp_step.py [--quick]``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch

import fmeta

FLOPS = 2 * (18 * 8 + 8 * 8 + 8)
BYTES, BYTES_IN_PASSES = 44, 84
SIZES = {"1M": [(1024, 1024)], "10M": [(1024, 1024)] * 10, "10M, one matrix": [(3200, 3200)]}


def median_time(call: Callable[[], Any], repeats: int, inner: int = 1) -> float:
    """Median CPU seconds of one call, after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(inner):
            call()
        seconds.append((time.process_time() - start) / inner)
    return statistics.median(seconds)


def machine(repeats: int, quick: bool) -> dict[str, float]:
    """Bytes/s of triad and clone, FLOP/s of matmuls."""
    n = 2**22 if quick else 2**25
    a, b, c = torch.empty(n), torch.ones(n), torch.ones(n)
    found = {
        "triad GB/s": 12e-9 * n / median_time(lambda: torch.add(b, c, alpha=0.5, out=a), repeats),
        "clone GB/s": 8e-9 * n / median_time(b.clone, repeats),
    }
    n = 2**14
    for name, (rows, inner) in {"8x18": (8, 18), "8x8": (8, 8), "1x8": (1, 8)}.items():
        w, x, y = torch.randn(rows, inner), torch.randn(inner, n), torch.empty(rows, n)
        seconds = median_time(lambda w=w, x=x, y=y: torch.mm(w, x, out=y), repeats, 100)
        found[f"matmul {name} GFLOP/s"] = 2e-9 * rows * inner * n / seconds
    x = torch.randn(1024, 1024)
    found["matmul 1024 GFLOP/s"] = 2e-9 * 1024**3 / median_time(lambda: x @ x, repeats)
    # The rate at the network's own shapes: its FLOPs over the sum of the times.
    parts = {"8x18": 288, "8x8": 128, "1x8": 16}
    took = sum(flops / found[f"matmul {name} GFLOP/s"] for name, flops in parts.items())
    found["network GFLOP/s"] = FLOPS / took
    return found


def step_time(optimizer: fmeta.Optimizer, shapes: list[tuple[int, int]], repeats: int) -> float:
    """Median CPU seconds of a step; the state is carried on, as in training."""
    generator = torch.Generator().manual_seed(0)
    params = {str(i): torch.randn(s, generator=generator) for i, s in enumerate(shapes)}
    grads = {k: torch.randn(v.shape, generator=generator) for k, v in params.items()}
    theta = optimizer.init()
    state = [params, optimizer.init_hidden(theta, params)]

    def step() -> None:
        state[:] = optimizer.step(theta, state[0], grads, state[1])

    with torch.no_grad():
        return median_time(step, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="1M parameters, small probes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 5 if args.quick else 9
    limits = machine(repeats, args.quick)
    for name, value in limits.items():
        print(f"{name:24} {value:8.1f}")

    rules = {
        "normalized_mlp": fmeta.optimizers.normalized_mlp(),
        "normalized_mlp, one tile": fmeta.optimizers.normalized_mlp(chunk_size=2**40),
        "adam": fmeta.optimizers.adam(),
        "sgd": fmeta.optimizers.sgd(),
    }
    rows = []
    print(
        f"\n{'step':26}{'parameters':>18}{'ms':>9}{'ns each':>9}{'of matmul':>11}{'of memory':>11}"
    )
    for size, shapes in SIZES.items():
        if args.quick and size != "1M":
            continue
        n = sum(a * b for a, b in shapes)
        for name, rule in rules.items():
            if name.endswith("one tile") and size == "10M, one matrix":
                continue  # takes 2 GB
            seconds = step_time(rule, shapes, repeats)
            row: dict[str, Any] = {"step": name, "parameters": size, "seconds": seconds}
            row["ns each"] = 1e9 * seconds / n
            print(f"{name:26}{size:>18}{1e3 * seconds:9.2f}{row['ns each']:9.2f}", end="")
            if name.startswith("normalized"):
                row["of matmul"] = 1e-9 * FLOPS * n / seconds / limits["network GFLOP/s"]
                row["of memory"] = 1e-9 * BYTES * n / seconds / limits["triad GB/s"]
                row["of memory in passes"] = row["of memory"] * BYTES_IN_PASSES / BYTES
                print(f"{row['of matmul']:11.0%}{row['of memory']:11.0%}", end="")
            print()
            rows.append(row)
    print(
        f"\nof matmul: {FLOPS} FLOPs a coordinate at the measured rate of the network's shapes; of "
        f"memory: {BYTES} bytes at triad's rate ({BYTES_IN_PASSES} when passed as often as needed)."
    )
    if args.json is not None:
        constants = {"flops": FLOPS, "bytes": BYTES, "bytes in passes": BYTES_IN_PASSES}
        results = {"torch": torch.__version__, "limits": limits, "steps": rows, **constants}
        args.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
