"""What `fmeta.plan_memory` says beside the resident memory of a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _timing
import torch
from _language_model import language_model
from torch import Tensor, nn

import fmeta
from fmeta import trees

__all__ = ["compare", "measure"]

BAR = 0.2
Problem = tuple[fmeta.Optimizer, Callable[..., Tensor], Any, Any]
# Name of the problem, options.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("MLP, 1000 steps, Adam", {}),
    ("MLP, 1000 steps, Adam", {"checkpoint": "sqrt"}),
    ("MLP, 1000 steps, Adam", {"checkpoint": 10}),
    ("transformer, 16 steps, linear", {"checkpoint": "sqrt"}),
    ("transformer, 16 steps, linear", {"checkpoint": "sqrt", "mixed_mode": True}),
    ("transformer, 16 steps, linear", {"checkpoint": 5, "recompute": "gradient", "chunked": 65536}),
]


def problem(name: str, quick: bool) -> Problem:
    """Optimizer, loss, first parameters and batches."""
    generator = torch.Generator().manual_seed(0)
    if name.startswith("MLP"):
        steps = 100 if quick else 1000
        net = nn.Sequential(
            nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
        )
        loss_fn = fmeta.loss_of(net, nn.functional.cross_entropy)
        params = {
            path: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
            for path, p in fmeta.functionalize(net)[1].items()
        }
        x = torch.randn(steps, 128, 64, generator=generator)
        y = (x @ torch.randn(64, 10, generator=generator)).argmax(-1)
        rule = fmeta.learn(fmeta.optimizers.adam, {"lr": "log"}, lr=1e-3)
        return rule, loss_fn, params, (x, y)
    sizes = {"vocabulary": 2048, "width": 256, "blocks": 4, "length": 64}
    if quick:
        sizes |= {"width": 64, "blocks": 2}
    params, loss_fn = language_model(**sizes, generator=generator)
    tokens = torch.randint(sizes["vocabulary"], (16, 4, 65), generator=generator)
    return fmeta.optimizers.linear(0.02), loss_fn, params, tokens


def measure(case: int, quick: bool = False) -> dict[str, Any]:
    """Bytes that one case adds to the resident memory of this process, and those planned."""
    torch.set_num_threads(1)
    name, options = CASES[case]
    rule, loss_fn, params, batches = problem(name, quick)
    opt_params = rule.init()
    plan = fmeta.plan_memory(rule, loss_fn, opt_params, params, batches, choices=[options])
    given = {k: v for k, v in options.items() if k != "chunked"}
    used = fmeta.chunked(rule, options["chunked"]) if "chunked" in options else rule
    theta = trees.map(lambda x: x.detach().requires_grad_(), opt_params)

    def call(batches: Any) -> None:
        for x in trees.leaves(theta):
            x.grad = None
        fmeta.unroll(used, loss_fn, theta, params, batches, **given).losses.mean().backward()

    few = trees.map(lambda x: x[:3], batches)
    return {
        "problem": name,
        "options": options,
        "parameters": sum(p.numel() for p in params.values()),
        "measured": _timing.measured(lambda: call(few), lambda: call(batches)),
        "planned": plan.choices[0].bytes,
        "bookkeeping": plan.choices[0].bookkeeping,
    }


def compare(in_process: Callable[..., dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """All cases, each in a process of its own; prints a table."""
    results, rows = [], []
    for i in range(len(CASES)):
        found = in_process("plan", i, quick)
        ratio = (found["planned"] + found["bookkeeping"]) / found["measured"]
        results.append({**found, "ratio": ratio})
        rows.append(
            {
                "problem": found["problem"],
                "parameters": found["parameters"],
                "options": ", ".join(f"{k}={v!r}" for k, v in found["options"].items()) or "none",
                "planned MB": found["planned"] / _timing.MB,
                "bookkeeping MB": found["bookkeeping"] / _timing.MB,
                "measured MB": found["measured"] / _timing.MB,
                "both / measured": ratio,
                "verdict": "" if quick else ("bar met" if abs(ratio - 1) <= BAR else "no"),
            }
        )
        print(list(rows[-1].values()), flush=True)
    print("bar: both within 20 % of what the resident memory of a fresh process grows by")
    print(_timing.table(rows))
    return results
