"""Speed of persistent evolution strategies: inner training steps per CPU second, and FLOP/s.

The claim: on the rule of a feasibility study, whose eager prototype reached 2,000 to 2,180 steps
per CPU second, fmeta makes at least 1.5 times as many; or a rule's estimates run at half the rate
that its own matrix products reach alone.

A step is one update of one model by one perturbed copy of the rule: digits MLP 64-32-10, batch 128,
truncations of 20 steps, trainings of 200. "eager" runs the step under `vmap` each time, "recorded"
(the default of fmeta) replays its operations, "compiled" hands them to torch.compile first, which
takes a quarter of a minute and more. More particles than fit the cache are worked on in chunks of
CHUNK members. FLOPs are those of matrix products, counted by torch; "products
alone" is the time of exactly these products, of the same shapes and layouts, one after the other.

CPU time of one thread, medians, competitors in turns. Run: ``python benchmarks/meta_training.py
[--quick]``, about five minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from _study_rule import study_rule
from _timing import arguments, environment, finish, median_times, table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fmeta

TRUNCATION, HORIZON = 20, 200
CHUNK = 32
STUDY = (2000, 2180)  # steps per CPU second of its eager prototype
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}
RULES = {
    "normalized_mlp": lambda: fmeta.optimizers.normalized_mlp(lr=0.01),
    "basis_mlp": fmeta.optimizers.basis_mlp,
    "study's rule": study_rule,
}


class Products(TorchDispatchMode):
    """Collects the matrix products that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


def chain(rule: fmeta.Optimizer, particles: int, **options: Any) -> Callable[[], Any]:
    """A call that makes the next estimate of a meta-training that goes on."""
    family = fmeta.tasks.digits((32,), batch_size=128)
    estimator = fmeta.estimators.pes(
        rule,
        family,
        num_tasks=particles,
        horizon=HORIZON,
        truncation=TRUNCATION,
        std=0.01,
        chunk_size=CHUNK,
        **options,
    )
    theta = rule.init()
    state = [estimator.init(theta, 0)]

    def estimate() -> Any:
        found, state[0] = estimator.estimate(theta, state[0])
        return found

    return estimate


def products_of(call: Callable[[], Any]) -> tuple[float, Callable[[], None]]:
    """FLOPs of a call's matrix products, and a call that computes these alone."""
    with FlopCounterMode(display=False) as counter:
        call()
    with Products() as seen:
        call()

    def alone() -> None:
        for func, args in seen.found:
            func(*args)

    return float(counter.get_total_flops()), alone


def measure(name: str, particles: int, repeats: int) -> dict[str, Any]:
    rule = RULES[name]()
    calls = {
        "eager": chain(rule, particles, trace=False),
        "recorded": chain(rule, particles),
        "compiled": chain(rule, particles, compile=True),
    }
    calls["recorded"]()  # which records the step
    flops, calls["alone"] = products_of(calls["recorded"])
    times = median_times(calls, repeats)
    steps = 2 * particles * TRUNCATION
    return {
        "rule": name,
        "particles": particles,
        **{f"{way}, steps/CPU s": steps / times[way] for way in ("eager", "recorded", "compiled")},
        "recorded / study": steps / times["recorded"] / STUDY[1],
        "compiled / study": steps / times["compiled"] / STUDY[1],
        "recorded, GFLOP/s": 1e-9 * flops / times["recorded"],
        "compiled, GFLOP/s": 1e-9 * flops / times["compiled"],
        "products alone, GFLOP/s": 1e-9 * flops / times["alone"],
        "recorded / products": times["alone"] / times["recorded"],
        "compiled / products": times["alone"] / times["compiled"],
    }


def main() -> None:
    args = arguments((__doc__ or "").splitlines()[0])
    torch.set_num_threads(1)
    sizes, repeats = ((4,), 2) if args.quick else ((16, 64), 7)
    rows = [measure(name, n, repeats) for name in RULES for n in sizes]
    print(table(rows))
    print(
        f"\n/ study: over {STUDY[1]} steps per CPU second, the best of its eager prototype (its "
        "own rule, another run); / products: the rate of FLOPs over that of the products alone."
    )
    finish(args.json, {"rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
