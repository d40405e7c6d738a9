"""Speed of meta-training: inner steps per CPU second and FLOP/s, beside JAX in the same run.

Meta-gradients of `adafactor_mlp`, `mlp` and `normalized_mlp` by PES and by truncated
backpropagation, of trainings of 200 steps on digits (batch 128) in pieces of 20, of an MLP 64-32-10
and of a CNN with two convolutions (8 and 16 channels). A step is one update of one model; PES makes
two for a particle, one for each of a pair of copies.

- "eager" runs the step under `vmap` each time, "recorded" (the default of PES) replays its
  operations, "compiled" hands them (and their derivative) to torch.compile first.
- "JAX" is the same rule and the same estimate under `jit`, `vmap` over the particles of a
  `lax.scan` (`_jax_rules.py`, `_jax_estimators.py`); before anything is timed, its inner steps must
  give fmeta's numbers, with ``--check`` whole estimates from the same draws (`_jax_check.py`).
- All work on a chunk of members at a time, so that these stay in the cache.
- FLOPs are those of matrix products, counted by torch in the step as it is, for all ways alike;
  "products" is the rate of exactly these products, of the same shapes and layouts, one after the
  other and nothing else.
- "cold" is the CPU time to the first estimate, compilation included, imports not.

One core for the whole process, CPU time, medians, competitors in turns. JAX comes with the `bench`
extra; without it, its columns are left out. Run: ``python benchmarks/meta_training.py [--quick]
[--rules ...] [--particles ...] [--models ...] [--estimates ...]``.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import _one_core  # noqa: F401 (before torch and JAX)
import torch
from _timing import environment, finish, median_times, table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fmeta
from fmeta.optimizers import _coordinate_net

try:
    import jax
except ImportError:
    jax = None

TRUNCATION, HORIZON, BATCH, STD = 20, 200, 128, 0.01
# Members at a time, the fastest of those tried for each.
CHUNKS = {"eager": 32, "recorded": 32, "compiled": 64, "JAX": 8}
CHUNKS_OF_CNN = {**CHUNKS, "compiled": 32}  # whose patches take more of the cache
RULES = ("adafactor_mlp", "mlp", "normalized_mlp")
WAYS: dict[str, dict[str, dict[str, bool]]] = {
    "pes": {"eager": {"trace": False}, "recorded": {}, "compiled": {"compile": True}},
    "truncated": {"eager": {}, "compiled": {"compile": True}},
}
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.mv.default,
}

Call = Callable[[], Any]


def rule_of(name: str) -> fmeta.Optimizer:
    """fmeta's rule of this name, as JAX has it."""
    if name == "normalized_mlp":
        return fmeta.optimizers.normalized_mlp(lr=0.01)
    found: fmeta.Optimizer = getattr(fmeta.optimizers, name)()
    return found


def family_of(model: str) -> fmeta.tasks.TaskFamily:
    return fmeta.tasks.digits({"mlp": (32,), "cnn": (8, 16)}[model], "relu", BATCH, model)


def chunks_of(model: str) -> dict[str, int]:
    return CHUNKS_OF_CNN if model == "cnn" else CHUNKS


def chain(name: str, model: str, kind: str, particles: int, way: str) -> Call:
    """A call that makes the next estimate of a meta-training that goes on."""
    rule, build = rule_of(name), getattr(fmeta.estimators, kind)
    options: Any = {"std": STD} if kind == "pes" else {}
    estimator = build(
        rule,
        family_of(model),
        num_tasks=particles,
        horizon=HORIZON,
        truncation=TRUNCATION,
        chunk_size=chunks_of(model)[way],
        **options,
        **WAYS[kind][way],
    )
    theta = rule.init()
    state = [estimator.init(theta, 0)]

    def estimate() -> Any:
        found, state[0] = estimator.estimate(theta, state[0])
        return found

    return estimate


def chain_in_jax(name: str, model: str, kind: str, particles: int) -> Call:
    """The same in JAX."""
    from _jax_check import in_jax, problem_of
    from _jax_estimators import pes_chain, truncated_chain
    from _jax_rules import RULES as rules

    theta = in_jax(rule_of(name).init())
    common: Any = (rules[name](), problem_of(model), theta, particles)
    sizes: Any = {"steps": TRUNCATION, "horizon": HORIZON, "batch_size": BATCH}
    chunk = chunks_of(model)["JAX"]
    if kind == "pes":  # whose chunks are of tasks, with two members each
        call: Call = pes_chain(*common, **sizes, std=STD, chunk=min(chunk // 2, particles))
    else:
        call = truncated_chain(*common, **sizes, chunk=min(chunk, particles))
    return call


# -- products alone ------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Collects the matrix products that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.found.append((func, tuple(_detached(x) for x in args)))
        return func(*args, **(kwargs or {}))


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x


def products_of(build: Callable[[], Call]) -> tuple[float, Call]:
    """FLOPs of a call's matrix products, and a call that computes these alone.

    The networks of all members are built as products here, not as the one operation that they are
    where nothing differentiates, into which neither the count nor the collection can look.
    """
    with mock.patch.object(_coordinate_net, "undifferentiated_now", return_value=False):
        call = build()
        call()
        with FlopCounterMode(display=False) as counter:
            call()
        with Products() as seen:
            call()

    @torch.no_grad()
    def alone() -> None:
        for func, args in seen.found:
            func(*args)

    return float(counter.get_total_flops()), alone


# -- what is measured ----------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process and of the compilers that it has run."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def measure(name: str, model: str, kind: str, particles: int, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    builds: dict[str, Callable[[], Call]] = {
        way: functools.partial(chain, name, model, kind, particles, way) for way in WAYS[kind]
    }
    if jax is not None:
        builds["JAX"] = functools.partial(chain_in_jax, name, model, kind, particles)
    calls, cold = {}, {}
    for way, build in builds.items():
        before = cpu_seconds()
        calls[way] = build()
        calls[way]()
        cold[way] = cpu_seconds() - before
    plain = list(WAYS[kind])[-2]  # of those that are not compiled the last
    flops, calls["products"] = products_of(builds[plain])
    times = median_times(calls, repeats)
    steps = particles * TRUNCATION * (2 if kind == "pes" else 1)
    row: dict[str, Any] = {
        "estimate": kind,
        "model": model,
        "rule": name,
        "particles": particles,
        **{f"{way}, steps/s": steps / times[way] for way in builds},
        **{f"{way}, GFLOP/s": 1e-9 * flops / times[way] for way in builds},
        "products, GFLOP/s": 1e-9 * flops / times["products"],
        **{f"{way} / products": times["products"] / times[way] for way in (plain, "compiled")},
    }
    if jax is not None:
        row |= {f"{way} / JAX": times["JAX"] / times[way] for way in (plain, "compiled")}
    return row | {f"{way}, cold s": cold[way] for way in builds}


def check(rules: list[str], models: list[str], estimates: bool) -> None:
    """Raises a SystemExit unless JAX gives fmeta's numbers."""
    from _jax_check import agreement

    for name in rules:
        for model in models:
            found = ", ".join(f"{k} {v:.1e}" for k, v in agreement(name, model, estimates).items())
            print(f"JAX beside fmeta, largest difference, {name}, {model}: {found}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument(
        "--particles",
        nargs="+",
        type=int,
        help="default: 16 64 256; of a CNN and of truncated gradients the middle one alone",
    )
    parser.add_argument("--models", nargs="+", choices=("mlp", "cnn"), default=["mlp", "cnn"])
    parser.add_argument(
        "--estimates", nargs="+", choices=("pes", "truncated"), default=["pes", "truncated"]
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare whole estimates with JAX's first, not inner steps alone (a minute each)",
    )
    return parser.parse_args()


def main() -> None:
    args, start = arguments(), time.perf_counter()
    torch.set_num_threads(1)
    sizes = args.particles or ([4] if args.quick else [16, 64, 256])
    if jax is None:
        print("JAX is not installed (the bench extra): its columns are left out")
    else:
        check(args.rules, args.models, args.check)
    rows = []
    for kind in args.estimates:
        for model in args.models:
            for name in args.rules:
                for n in sizes:
                    if (model == "cnn" or kind == "truncated") and n != sizes[len(sizes) // 2]:
                        continue  # one size shows what these cost
                    # Larger sizes are longer calls, of which fewer are needed.
                    repeats = 2 if args.quick or n > 100 else 3 if n > 32 else 7
                    rows.append(measure(name, model, kind, n, repeats))
                    print(table(rows[-1:]), f"({time.perf_counter() - start:.0f} s)\n", flush=True)
    for kind in args.estimates:
        print(table([row for row in rows if row["estimate"] == kind]), "\n")
    finish(args.json, {"rows": rows, "environment": environment("jax")})


if __name__ == "__main__":
    main()
