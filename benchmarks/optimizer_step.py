"""One `LearnedOptimizer.step()` on whole models, beside AdamW and PyLO's plain learned optimizer.

For a ResNet and a transformer of about 1, 10 and 100 million parameters it prints, for each rule:
CPU nanoseconds a parameter (medians, one thread, competitors in turns), bytes of hidden state a
parameter, bytes by which one step raises the resident memory of a fresh process over what model,
gradients and hidden state hold, and the share of the machine's limit. The limit of a rule is the
longer of two times, both with what was measured in the same run: its least memory traffic
(parameter, gradient and state read, parameter and state written) at the rate of ``triad``, and the
floating-point operations of its matrix products at the rate that such products reach at the
network's own shapes (``1024``: of square matrices of that size, the machine's best). Then: 1,000
small tensors against one large one.

PyLO's plain ``AdafacLO_naive`` (github.com/Belilovsky-Lab/pylo; the ``pylo`` of PyPI is something
else) is timed where it can be imported, with random weights, beside the same networks here: hidden
layers 2 x 4 ("small_fc", the default of ``adafactor_mlp``), 1 x 32, and 2 x 32, which is PyLO's own
(its ``hidden_layers=1`` are those between the first and the last hidden one).

Compiled rules (``--compile``) are timed like the others; the seconds that their first step took,
compilation included, are in the column "first s".

Run: ``python benchmarks/optimizer_step.py [--quick] [--json PATH] [--no-large] [--compile]``, or
parts of it: ``--rules velo "normalized_mlp, compiled" --sizes 1e7 --models ResNet --repeats 3
--no-memory --no-small``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import _timing
import torch
from torch import Tensor

import fmeta
import fmeta.torch_optim
from fmeta import trees

Shapes = list[tuple[int, ...]]


def resnet(numel: float) -> Shapes:
    """Shapes of a ResNet with 16 blocks of two convolutions, of about that many parameters."""
    base = max(4, 4 * round(64 * math.sqrt(numel / 21.3e6) / 4))
    shapes: Shapes = [(base, 3, 7, 7), (base,), (base,)]
    before = base
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = base * 2**stage
        for block in range(blocks):
            shapes += [(width, before, 3, 3), (width,), (width,), (width, width, 3, 3)]
            shapes += [(width,), (width,)]
            if block == 0 and width != before:
                shapes += [(width, before, 1, 1), (width,), (width,)]
            before = width
    return [*shapes, (1000, before), (1000,)]


def transformer(numel: float) -> Shapes:
    """Shapes of a decoder-only transformer, 8 layers, of about that many parameters."""
    width = max(16, 16 * round(math.sqrt(numel / (12 * 8) / 1.17) / 16))
    shapes: Shapes = [(min(16384, 16 * width), width), (512, width)]
    for _ in range(8):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width)]
        shapes += [(width,)]
    return [*shapes, (width,), (width,)]


MODELS: dict[str, Callable[[float], Shapes]] = {"ResNet": resnet, "transformer": transformer}


class Rule(NamedTuple):
    """A competitor, and the least that one coordinate of a large matrix costs it.

    Attributes:
        build: ``build(params) -> torch.optim.Optimizer``.
        layers: (inputs, outputs) of the matrix products a coordinate; inputs that are constant
            along rows or columns are not counted.
        planes: hidden numbers a coordinate, each read and written.
    """

    build: Callable[[list[Tensor]], Any]
    layers: tuple[tuple[int, int], ...]
    planes: int


def learned(name: str, compile: bool = False, **arguments: Any) -> Callable[[list[Tensor]], Any]:
    def build(params: list[Tensor]) -> Any:
        more = {"compile": True} if compile else {}
        rule = getattr(fmeta.optimizers, name)(**arguments, **more)
        th = rule.init(torch.Generator().manual_seed(0))
        return fmeta.torch_optim.LearnedOptimizer(params, rule, th, lr=1e-3, num_steps=1000)

    return build


def pylo(which: str) -> Callable[[list[Tensor]], Any]:
    """PyLO's plain optimizer, with its network's random start in place of a download."""

    def build(params: list[Tensor]) -> Any:
        import pylo.models.Meta_MLP as nets
        from pylo.optim.AdafacLO_naive import AdafacLO_naive

        torch.manual_seed(0)
        layers, size = map(int, which.split(" x "))
        net = nets.MetaMLP(39, size, layers - 1)  # which counts them from the second one
        kept = nets.MetaMLP.from_pretrained
        nets.MetaMLP.from_pretrained = staticmethod(lambda key: net)
        try:
            return AdafacLO_naive(params, lr=1e-3)
        finally:
            nets.MetaMLP.from_pretrained = kept

    return build


RULES = {
    "AdamW, foreach": Rule(lambda p: torch.optim.AdamW(p, foreach=True), (), 2),
    "AdamW, fused": Rule(lambda p: torch.optim.AdamW(p, fused=True), (), 2),
    "adam": Rule(learned("adam"), (), 2),
    "normalized_mlp": Rule(learned("normalized_mlp"), ((18, 8), (8, 8), (8, 1)), 4),
    "adafactor_mlp": Rule(learned("adafactor_mlp"), ((16, 4), (4, 4), (4, 2)), 4),
    "adafactor_mlp, 1 x 32": Rule(
        learned("adafactor_mlp", hidden_size=32, hidden_layers=1), ((16, 32), (32, 2)), 4
    ),
    "adafactor_mlp, 2 x 32": Rule(
        learned("adafactor_mlp", hidden_size=32), ((16, 32), (32, 32), (32, 2)), 4
    ),
    "velo": Rule(learned("velo"), ((16, 4), (4, 4), (4, 3)), 4),
    "lstm": Rule(learned("lstm"), ((2, 80), (20, 80), (20, 80), (20, 80), (20, 1)), 80),
}
_SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "2 x 4": ((39, 4), (4, 4), (4, 2)),
    "1 x 32": ((39, 32), (32, 2)),
    "2 x 32": ((39, 32), (32, 32), (32, 2)),
}
PYLO = {f"PyLO, plain, {size}": Rule(pylo(size), layers, 4) for size, layers in _SIZES.items()}
COMPILED = {
    f"{name}, compiled": RULES[name]._replace(build=learned(rule, compile=True, **arguments))
    for name, rule, arguments in (
        ("normalized_mlp", "normalized_mlp", {}),
        ("adafactor_mlp", "adafactor_mlp", {}),
        ("adafactor_mlp, 1 x 32", "adafactor_mlp", {"hidden_size": 32, "hidden_layers": 1}),
        ("adafactor_mlp, 2 x 32", "adafactor_mlp", {"hidden_size": 32}),
    )
}
if importlib.util.find_spec("pylo") is not None:
    RULES |= PYLO

# Of which more than this do not fit into 16 GB beside the model.
_MOST = {"lstm": 20e6}


def model(shapes: Shapes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.randn(shape, generator=generator).mul_(0.05).requires_grad_()
        p.grad = torch.randn(shape, generator=generator).mul_(0.01)
        params.append(p)
    return params


def warm_and_step(name: str, which: str, numel: float) -> tuple[Callable[[], Any], ...]:
    """For `_timing.peak_memory`: two steps make state and code, then one is measured."""
    shapes = MODELS[which](numel)
    params = model(shapes)
    step = stepper((RULES | COMPILED)[name].build(params))

    def warm_up() -> None:
        for _ in range(2):
            step()

    return warm_up, step


def stepper(optimizer: Any) -> Callable[[], Any]:
    """A step; rules that read the loss are given one."""
    if not isinstance(optimizer, fmeta.torch_optim.LearnedOptimizer):
        return optimizer.step
    loss = torch.tensor(1.0)
    return lambda: optimizer.step(loss=loss)


def hidden_bytes(optimizer: Any) -> int:
    """Bytes of all state tensors, those that several parameters share counted once."""
    tensors = [
        x
        for state in optimizer.state.values()
        for x in trees.leaves(dict(state))
        if isinstance(x, Tensor)
    ]
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())


def machine(quick: bool, rules: dict[str, Rule]) -> dict[str, float]:
    """Bytes/s of ``triad`` and FLOP/s of the rules' matrix products, by ``inputs x outputs``."""
    n = 2**22 if quick else 2**25
    a, b, c = torch.empty(n), torch.ones(n), torch.ones(n)
    repeats = 5 if quick else 15
    calls: dict[str, Callable[[], Any]] = {"triad": lambda: torch.add(b, c, alpha=0.5, out=a)}
    square = torch.randn(1024, 1024)
    calls["1024"] = lambda: square @ square
    shapes = {layer for rule in rules.values() for layer in rule.layers}
    width = 2**14
    for inputs, outputs in sorted(shapes):
        w, x = torch.randn(outputs, inputs), torch.randn(inputs, width)
        y = torch.empty(outputs, width)

        def many(w: Tensor = w, x: Tensor = x, y: Tensor = y) -> None:
            for _ in range(20):
                torch.mm(w, x, out=y)

        calls[f"{inputs} x {outputs}"] = many
    took = _timing.median_times(calls, repeats)
    rates = {"triad": 12.0 * n / took.pop("triad"), "1024": 2.0 * 1024**3 / took.pop("1024")}
    for layer, seconds in took.items():
        inputs, outputs = map(int, layer.split(" x "))
        rates[layer] = 20 * 2.0 * inputs * outputs * width / seconds
    return rates


def limits(rule: Rule, rates: dict[str, float]) -> tuple[float, float]:
    """The longer of the two times of a coordinate, seconds: at the products' own rate and at best.

    The own rate is not taken above that of large matrices.
    """
    memory = 4 * (2 + 1 + 2 * rule.planes) / rates["triad"]
    own = best = 0.0
    for inputs, outputs in rule.layers:
        flops = 2.0 * inputs * outputs
        own += flops / rates[f"{inputs} x {outputs}"]
        best += flops / rates["1024"]
    return max(memory, own), max(memory, best)


def measure(
    which: str,
    numel: float,
    rates: dict[str, float],
    repeats: int,
    rules: dict[str, Rule],
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Rows of one model; without ``memory``, "extra" is NaN."""
    shapes = MODELS[which](numel)
    n = sum(map(math.prod, shapes))
    rows = []
    peers: dict[str, float] = {}
    # A few at a time: all of them with their states would not fit into memory.
    for names in _groups(rules, n):
        built = {name: rules[name].build(model(shapes)) for name in names}
        calls = {k: stepper(o) for k, o in built.items()}
        first = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            first[name] = time.perf_counter() - start
        took = _timing.median_times(calls, repeats, warmup=1)
        for name, seconds in took.items():
            hidden = hidden_bytes(built[name]) / n
            peak = math.nan
            if memory:
                given = ("optimizer_step", "warm_and_step", name, which, numel)
                peak = _timing.peak_memory(*given) / n
            own, best = limits(rules[name], rates)
            peers[name] = seconds
            rows.append(
                {
                    "model": f"{which}, {n / 1e6:.1f}M in {len(shapes)}",
                    "rule": name,
                    "ns": 1e9 * seconds / n,
                    "hidden B": hidden,
                    "extra B": peak,
                    "extra / hidden": peak / hidden if hidden else math.nan,
                    "time / limit": seconds / n / own,
                    "time / best limit": seconds / n / best,
                    "/ AdamW, foreach": seconds / peers["AdamW, foreach"],
                    "first s": first[name],
                }
            )
        del built
    return rows


def _groups(rules: dict[str, Rule], n: int) -> list[list[str]]:
    fits = [name for name in rules if n <= _MOST.get(name, math.inf)]
    if n < 3e7:
        return [fits]
    return [[name] for name in fits]


def many_small(repeats: int, names: list[str], quick: bool) -> list[dict[str, Any]]:
    """1,000 tensors of 32 x 32, and of four shapes mixed, against one of the same size."""
    count = 200 if quick else 1000
    mixed = [(32, 32), (64, 16), (16, 64), (1024,)]
    shapes: dict[str, Shapes] = {
        "one": [(count, 1024)],
        "small": [(32, 32)] * count,
        "mixed": [mixed[i % 4] for i in range(count)],
    }
    rows = []
    for name in names:
        built = {k: RULES[name].build(model(s)) for k, s in shapes.items()}
        calls = {k: stepper(o) for k, o in built.items()}
        took = _timing.median_times(calls, repeats, warmup=2)
        rows.append(
            {
                "rule": name,
                f"one ({count}, 1024), ms": 1e3 * took["one"],
                f"{count} of (32, 32) / one": took["small"] / took["one"],
                f"{count} of four shapes / one": took["mixed"] / took["one"],
            }
        )
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast as PyLO's plain version with a network of the same size."""
    found = []
    for model_ in dict.fromkeys(row["model"] for row in rows):
        ns = {row["rule"]: row["ns"] for row in rows if row["model"] == model_}
        pairs = [(name, "2 x 4") for name in ("adafactor_mlp", "adafactor_mlp, compiled")]
        pairs += [(f"adafactor_mlp, {size}", size) for size in ("1 x 32", "2 x 32")]
        pairs += [(f"adafactor_mlp, {size}, compiled", size) for size in ("1 x 32", "2 x 32")]
        for ours, size in pairs:
            theirs = f"PyLO, plain, {size}"
            if ours in ns and theirs in ns:
                found.append(
                    {
                        "model": model_,
                        "rule": ours,
                        "peer": theirs,
                        "peer / rule": ns[theirs] / ns[ours],
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="1M parameters, few repeats")
    parser.add_argument("--no-large", action="store_true", help="leave out 100M parameters")
    parser.add_argument("--compile", action="store_true", help="compiled rules too (minutes)")
    parser.add_argument("--rules", nargs="*", help="only these (AdamW always)")
    parser.add_argument("--sizes", nargs="*", type=float, help="numbers of parameters, as 1e7")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, help="rounds that count")
    parser.add_argument("--no-memory", action="store_true", help="leave out extra memory")
    parser.add_argument("--no-small", action="store_true", help="leave out 1,000 small tensors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rules = RULES | (COMPILED if args.compile else {})
    if args.rules is not None:
        every = RULES | COMPILED
        unknown = [name for name in args.rules if name not in every]
        if unknown:
            parser.error(f"no rule {unknown[0]!r}; there are: {'; '.join(every)}")
        rules = {k: v for k, v in every.items() if k in ("AdamW, foreach", *args.rules)}
    if not importlib.util.find_spec("pylo"):
        print("pylo cannot be imported: its rows are left out\n")
    rates = machine(args.quick, rules)
    for name, rate in rates.items():
        print(f"{name:8} {1e-9 * rate:8.1f} {'GB/s' if name == 'triad' else 'GFLOP/s'}")
    rows: list[dict[str, Any]] = []
    sizes = [1e6] if args.quick else [1e6, 1e7] if args.no_large else [1e6, 1e7, 1e8]
    for numel in sizes if args.sizes is None else args.sizes:
        for which in args.models:
            repeats = args.repeats or (3 if numel > 3e7 else 5 if args.quick else 7)
            found = measure(which, numel, rates, repeats, rules, not args.no_memory)
            print("\n" + _timing.table(found), flush=True)
            rows += found
    faster = ratios(rows)
    if faster:
        print("\n" + _timing.table(faster))
    leafy = ("adam", "normalized_mlp", "adafactor_mlp", "velo", "lstm")
    small_names: list[str] = [k for k in leafy if k in rules and not args.no_small]
    small = many_small(args.repeats or (3 if args.quick else 7), small_names, args.quick)
    print("\n" + _timing.table(small) if small else "")
    _timing.finish(
        args.json,
        {
            "environment": _timing.environment("pylo"),
            "rates": rates,
            "steps": rows,
            "ratios": faster,
            "small": small,
        },
    )


if __name__ == "__main__":
    main()
