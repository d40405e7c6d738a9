"""Where `mixed_mode` pays: a language model under several ways of saving memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import _timing
import torch
from _language_model import language_model

import fmeta
from fmeta import trees

__all__ = ["compare", "measure"]

BAR = {"memory": 1 / 2, "time": 1.3}
STRETCH = {"memory": 1 / 3, "time": 1.2}
_MODEL = {"vocabulary": 256, "width": 64, "blocks": 2}
# Sizes of the model, sequences of a batch, inner steps.
SHAPES: dict[str, dict[str, int]] = {
    "many tokens": {**_MODEL, "length": 64, "batch": 16, "steps": 64},
    "a large batch": {**_MODEL, "length": 64, "batch": 128, "steps": 144},
    "a wider model": {**_MODEL, "width": 128, "length": 64, "batch": 128, "steps": 100},
    "long sequences": {**_MODEL, "length": 256, "batch": 2, "steps": 36},
    "few tokens": {**_MODEL, "width": 128, "length": 32, "batch": 2, "steps": 64},
}
# Options of `unroll`; "blocks": each block of the model goes through `fmeta.recomputed`.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed_mode": {"mixed_mode": True},
    'mixed_mode="keep_gradients"': {"mixed_mode": "keep_gradients"},
    "mixed_mode, recomputed blocks": {"mixed_mode": True, "blocks": True},
    'recompute="gradient"': {"recompute": "gradient"},
    "recomputed blocks": {"blocks": True},
}
_QUICK_STEPS = 9
ROUNDS = 3


def measure(shape: str, variant: str, quick: bool = False) -> dict[str, Any]:
    """The meta-gradient of one variant, in this process: bytes beyond those before it, CPU time.

    The CPU time is that of users only where the process frees memory as theirs do.

    The rule is Adam with learned rates; gradient with respect to them and to the first parameters.
    """
    torch.set_num_threads(1)
    sizes = dict(SHAPES[shape])
    steps, batch = sizes.pop("steps"), sizes.pop("batch")
    if quick:
        steps = _QUICK_STEPS
    options = dict(VARIANTS[variant])
    wrap = _recomputed if options.pop("blocks", False) else (lambda block: block)
    generator = torch.Generator().manual_seed(0)
    params, loss_fn = language_model(**sizes, generator=generator, wrap=wrap)
    tokens = torch.randint(
        sizes["vocabulary"], (steps, batch, sizes["length"] + 1), generator=generator
    )
    rule = fmeta.learn(fmeta.optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=1e-3)
    meta_params = trees.map(lambda x: x.requires_grad_(), {"init": params, "opt": rule.init()})
    seconds = 0.0

    def call(tokens: torch.Tensor) -> None:
        nonlocal seconds
        for x in trees.leaves(meta_params):
            x.grad = None
        start = time.process_time()
        run = fmeta.unroll(
            rule,
            loss_fn,
            meta_params["opt"],
            meta_params["init"],
            tokens,
            checkpoint="sqrt",
            **options,
        )
        run.losses.mean().backward()
        seconds = time.process_time() - start

    bytes_held = _timing.measured(lambda: call(tokens[:3]), lambda: call(tokens))
    return {
        "shape": shape,
        "variant": variant,
        "steps": steps,
        "parameters": sum(p.numel() for p in params.values()),
        "bytes": bytes_held,
        "seconds": seconds,
        "gradient": [x.grad.item() for x in trees.leaves(meta_params["opt"])],
    }


def compare(in_process: Callable[..., dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """All variants on the first shape, fewer on the others; prints a table."""
    results, rows = [], []
    for shape, sizes in SHAPES.items():
        variants = [v for v in VARIANTS if shape == "many tokens" or not v.endswith("blocks")]
        seconds: dict[str, list[float]] = {v: [] for v in variants}
        rounds = 1 if quick or sizes["batch"] > 16 else ROUNDS
        for _ in range(rounds):  # so that a busy hour is busy for all
            for variant in variants:
                seconds[variant].append(
                    in_process("mixed, timed", shape, variant, quick)["seconds"]
                )
        held = {v: in_process("mixed", shape, v, quick) for v in variants}
        plain = held["plain"]
        for variant, found in held.items():
            check_equal(found["gradient"], plain["gradient"])
            cost = statistics.median(
                a / b for a, b in zip(seconds[variant], seconds["plain"], strict=True)
            )
            memory = found["bytes"] / plain["bytes"]
            results.append(
                {**found, "seconds": seconds[variant], "memory ratio": memory, "time ratio": cost}
            )
            rows.append(
                {
                    "shape": shape,
                    'under checkpoint="sqrt"': variant,
                    "MB": found["bytes"] / _timing.MB,
                    "CPU s": statistics.median(seconds[variant]),
                    "memory / plain": memory,
                    "time / plain": cost,
                    "verdict": "" if quick or variant == "plain" else verdict(memory, cost),
                }
            )
            print(list(rows[-1].values()), flush=True)
    print("bar: half of the memory of plain at 1.3 times its time; stretch: a third at 1.2")
    print("time: median of the ratios of rounds in which all took turns")
    print(_timing.table(rows))
    return results


def check_equal(a: list[float], b: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-2, atol=1e-6)


def verdict(memory: float, cost: float) -> str:
    """Of memory and CPU time over those of the plain checkpointed unroll."""
    if memory <= STRETCH["memory"] and cost <= STRETCH["time"]:
        return "stretch met"
    return "bar met" if memory <= BAR["memory"] and cost <= BAR["time"] else "no"


def _recomputed(block: Any) -> Any:
    return fmeta.recomputed(block, check=False)
