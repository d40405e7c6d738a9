"""A 1000-step second-order unroll: what `checkpoint` saves in memory and costs in time.

The meta-gradient, with respect to the initial parameters and the learned rate of an inner Adam, of
the sum of the losses of an MLP 64-128-128-10 (tanh, batch 128, float32), by ``.backward()`` and by
``torch.func.grad``, under each schedule of ``fmeta.unroll(..., checkpoint=...)``.

    python benchmarks/long_unroll.py [--quick] [--json PATH]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import _timing
import torch
from torch import Tensor, nn

import fmeta

BAR = {"memory": 1 / 20, "time": 1.4}
STRETCH = {"memory": 1 / 25, "time": 1.15}
SIZES = (64, 128, 128, 10)
BATCH = 128


def meta_gradient(outer: str, checkpoint: str | int | None, steps: int) -> Callable[[], Any]:
    """A call that computes the meta-gradient once.

    Args:
        outer: ``"backward"`` or ``"func"``.
        checkpoint: the schedule.
        steps: number of inner steps.
    """
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Linear(SIZES[0], SIZES[1]),
        nn.Tanh(),
        nn.Linear(SIZES[1], SIZES[2]),
        nn.Tanh(),
        nn.Linear(SIZES[2], SIZES[3]),
    )
    loss_fn = fmeta.loss_of(net, nn.functional.cross_entropy)
    params = {
        name: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
        for name, p in fmeta.functionalize(net)[1].items()
    }
    x = torch.randn(steps, BATCH, SIZES[0], generator=generator)
    y = (x @ torch.randn(SIZES[0], SIZES[3], generator=generator)).argmax(-1)
    optimizer = fmeta.learn(fmeta.optimizers.adam, {"lr": "log"}, lr=1e-3)
    meta_params = {"init": params, "opt": optimizer.init()}

    def meta_loss(meta_params: Any) -> Tensor:
        run = fmeta.unroll(
            optimizer,
            loss_fn,
            meta_params["opt"],
            meta_params["init"],
            (x, y),
            checkpoint=checkpoint,
        )
        return run.losses.sum()

    if outer == "func":
        return lambda: torch.func.grad(meta_loss)(meta_params)

    def backward() -> Any:
        leaves = fmeta.trees.map(lambda p: p.detach().requires_grad_(), meta_params)
        meta_loss(leaves).backward()
        return fmeta.trees.map(lambda p: p.grad, leaves)

    return backward


def warm_and_call(
    outer: str, checkpoint: str | int | None, steps: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """For `_timing.peak_memory`: a few steps first, then the real thing; its data exist before."""
    return meta_gradient(outer, checkpoint, 4), meta_gradient(outer, checkpoint, steps)


def main() -> None:
    options = _timing.arguments(__doc__)
    torch.set_num_threads(1)
    steps, repeats = (100, 1) if options.quick else (1000, 3)
    schedules: list[str | int | None] = [None, "sqrt", 50, 20, 10, 5]
    calls = {(o, s): meta_gradient(o, s, steps) for o in ("backward", "func") for s in schedules}
    for outer in ("backward", "func"):
        check_equal(calls[outer, None](), calls[outer, "sqrt"]())

    rows, results = [], []
    for outer in ("backward", "func"):
        # The two that the bar compares take turns; the numbers of snapshots run once.
        times = _timing.median_times(
            {str(s): calls[outer, s] for s in schedules[:2]}, repeats, warmup=0
        )
        times |= _timing.median_times({str(s): calls[outer, s] for s in schedules[2:]}, 1, warmup=0)
        memory = {
            str(s): _timing.peak_memory("long_unroll", "warm_and_call", outer, s, steps)
            for s in schedules
        }
        for s in map(str, schedules):
            time_ratio, memory_ratio = times[s] / times["None"], memory["None"] / memory[s]
            results.append(
                {
                    "outer": outer,
                    "checkpoint": s,
                    "seconds": times[s],
                    "bytes": memory[s],
                    "time_ratio": time_ratio,
                    "memory_ratio": 1 / memory_ratio,
                }
            )
            rows.append(
                {
                    "outer": ".backward()" if outer == "backward" else "torch.func.grad",
                    "checkpoint": s,
                    "CPU s": times[s],
                    "peak MB": memory[s] / _timing.MB,
                    "time / plain": time_ratio,
                    "memory / plain": f"1/{memory_ratio:.1f}",
                    "verdict": ""
                    if options.quick or s == "None"
                    else verdict(time_ratio, 1 / memory_ratio),
                }
            )
    print(
        f"{steps} steps; bar: 1/20 of the memory at 1.4 times the CPU time; stretch: 1/25 at 1.15"
    )
    print(_timing.table(rows))
    _timing.finish(
        options.json,
        {
            "benchmark": "long_unroll",
            "steps": steps,
            "environment": _timing.environment(),
            "results": results,
        },
    )


def check_equal(a: Any, b: Any) -> None:
    for path, x, y in zip(
        fmeta.trees.paths(a), fmeta.trees.leaves(a), fmeta.trees.leaves(b), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3 * float(y.abs().max()), msg=path)


def verdict(time: float, memory: float) -> str:
    if time <= STRETCH["time"] and memory <= STRETCH["memory"]:
        return "stretch met"
    if time <= BAR["time"] and memory <= BAR["memory"]:
        return "bar met"
    return "no"


if __name__ == "__main__":
    main()
