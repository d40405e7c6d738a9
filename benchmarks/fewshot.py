"""MAML's meta-gradient by `fmeta.fewshot` beside `higher`, TorchOpt and learn2learn.

Episodes per CPU second, and peak memory in a fresh process, of the gradient of the mean query loss
with respect to the initial parameters: 5 inner steps of gradient descent, second and first order, 4
and 32 tasks in a meta-batch. On sinusoids from 10 points (net 1-40-40-1, relu) and on 5-way 5-shot
images (28x28, four blocks of convolution 3x3 with 32 filters, relu, pooling). Then 50 inner steps,
plain and with ``checkpoint="sqrt"``. The ways take turns of at least 50 ms, of calls one after the
other. Before they are timed all are checked to give equal gradients: to 1e-8 in float64 on two
tasks, and in float32, in which they are timed, to 1e-4 on sinusoids and 0.2 on images (where a
rounded number may fall on the other side of a relu or a maximum; by that TorchOpt under `vmap`
differs from TorchOpt); what fmeta replays is equal to the bit to what it recorded. Peers that are
not installed are left out, and said to be.

    python -m pip install higher torchopt learn2learn
    python benchmarks/fewshot.py [--problems sinusoid cnn] [--compile] [--quick] [--json PATH]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _timing
import torch
from torch import Tensor, nn

from fmeta import fewshot

STEPS, LONG = 5, 50
LR = 0.01
# Times the speed of the fastest peer, at 32 tasks: (bar, stretch).
BARS = {"sinusoid": (6.0, 8.0), "cnn": (0.9, 1.2)}
TURN = 0.05  # seconds
EQUAL = {"sinusoid": 1e-4, "cnn": 0.2}  # in float32, over the largest number of the gradient
MEMORY_BAR = 1 / 5  # of 50 steps with "sqrt", over 50 steps without
ORDERS = ("second", "first")

Gradient = list[Tensor]  # in the order of net.parameters()
Call = Callable[[], Gradient]


class Problem(NamedTuple):
    """A net and tasks for it.

    Attributes:
        net: the module whose parameters are the initialisation.
        criterion: (output, target) -> scalar.
        loss: its name in `fmeta.fewshot`.
        support, query: pairs (x, y), leading dimension the tasks.
    """

    net: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    loss: str
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]

    def num_tasks(self) -> int:
        return self.support[0].shape[0]


def sinusoid(num_tasks: int) -> Problem:
    source = fewshot.sinusoid(shots=10, queries=10)
    support, query, _ = fewshot.draw(source, [(0, i) for i in range(num_tasks)])
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return Problem(_seeded(net), nn.functional.mse_loss, "mse", tuple(support), tuple(query))


def cnn(num_tasks: int, channels: int = 32, ways: int = 5, shots: int = 5) -> Problem:
    g = torch.Generator().manual_seed(0)
    blocks: list[nn.Module] = []
    for inputs in (1, channels, channels, channels):
        # Without normalisation: the second derivative of torch's own under `vmap` of
        # `torch.func.grad` is off by a thousandth (2.13), so that TorchOpt's would not be equal.
        blocks += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels, ways))
    prototypes = torch.randn(num_tasks, ways, 1, 28, 28, generator=g)

    def images(each: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(ways).repeat_interleave(each).expand(num_tasks, -1)
        x = prototypes.repeat_interleave(each, 1)
        return x + 0.5 * torch.randn(x.shape, generator=g), y.contiguous()

    criterion = nn.functional.cross_entropy
    return Problem(_seeded(net), criterion, "cross_entropy", images(shots), images(shots))


def _seeded(net: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=g) * math.sqrt(2 / p[0].numel())
        else:
            p.data = torch.randn(p.shape, generator=g) * 0.1
    return net


PROBLEMS = {"sinusoid": sinusoid, "cnn": cnn}


def with_fmeta(problem: Problem, order: str, steps: int = STEPS, **options: Any) -> Call:
    builder = {"second": fewshot.maml, "first": fewshot.first_order_maml}[order]
    learner = builder(problem.net, lr=LR, num_steps=steps, loss=problem.loss, **options)
    meta_params = learner.init()
    episodes = fewshot.Episode(*(fewshot.Examples(*e) for e in (problem.support, problem.query)))

    def gradient() -> Gradient:
        grads = learner.estimate(meta_params, episodes).grads["model_params"]
        return [grads[name] for name, _ in problem.net.named_parameters()]

    return gradient


def with_higher(problem: Problem, order: str, steps: int = STEPS) -> Call:
    """As in its examples/maml-omniglot.py: task after task, each with a backward of its own.

    Of first order by its recipe: gradients at the end, added as those of the start.
    """
    import higher

    net, num_tasks = problem.net, problem.num_tasks()
    inner = torch.optim.SGD(net.parameters(), lr=LR)

    def gradient() -> Gradient:
        net.zero_grad()
        for i in range(num_tasks):
            with higher.innerloop_ctx(
                net, inner, copy_initial_weights=False, track_higher_grads=order == "second"
            ) as (fnet, diffopt):
                for _ in range(steps):
                    loss = problem.criterion(fnet(problem.support[0][i]), problem.support[1][i])
                    diffopt.step(loss)
                query = problem.criterion(fnet(problem.query[0][i]), problem.query[1][i])
                if order == "second":
                    (query / num_tasks).backward()
                    continue
                grads = torch.autograd.grad(query / num_tasks, list(fnet.parameters()))
                for p, g in zip(net.parameters(), grads, strict=True):
                    p.grad = g if p.grad is None else p.grad + g
        return [p.grad for p in net.parameters()]

    return gradient


def with_torchopt(problem: Problem, order: str, steps: int = STEPS) -> Call:
    """As in its examples/few-shot/maml_omniglot.py: MetaSGD, task after task, one backward.

    MetaSGD knows no first order; that is its functional rule on plain gradients.
    """
    import torchopt

    net, num_tasks = problem.net, problem.num_tasks()
    meta_params = list(net.parameters())
    inner = torchopt.MetaSGD(net, lr=LR)
    names = [name for name, _ in net.named_parameters()]

    def second() -> Gradient:
        for p in meta_params:
            p.grad = None
        losses = []
        start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        inner_start = torchopt.extract_state_dict(inner, by="reference")
        for i in range(num_tasks):
            for _ in range(steps):
                inner.step(problem.criterion(net(problem.support[0][i]), problem.support[1][i]))
            losses.append(problem.criterion(net(problem.query[0][i]), problem.query[1][i]))
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, inner_start)
        torch.stack(losses).mean().backward()
        return [p.grad for p in meta_params]

    def first() -> Gradient:
        losses = []
        rule = torchopt.sgd(lr=LR)
        for i in range(num_tasks):
            params: tuple[Tensor, ...] = tuple(meta_params)
            state = rule.init(params)

            def output(x: Tensor, params: Any) -> Any:
                return torch.func.functional_call(net, dict(zip(names, params, strict=True)), (x,))

            for _ in range(steps):
                loss = problem.criterion(
                    output(problem.support[0][i], params), problem.support[1][i]
                )
                grads = torch.autograd.grad(loss, params)
                updates, state = rule.update(grads, state, inplace=False)
                params = torchopt.apply_updates(params, updates, inplace=False)
            losses.append(
                problem.criterion(output(problem.query[0][i], params), problem.query[1][i])
            )
        return list(torch.autograd.grad(torch.stack(losses).mean(), meta_params))

    return second if order == "second" else first


def with_torchopt_vmap(problem: Problem, order: str, steps: int = STEPS) -> Call:
    """As in its examples/FuncTorch/maml_omniglot_vmap.py, with `torch.func` for functorch."""
    import torchopt

    net = problem.net
    meta_params = dict(net.named_parameters())

    def loss_fn(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return problem.criterion(torch.func.functional_call(net, params, (x,)), y)

    def task_loss(params: Any, support: Any, query: Any) -> Tensor:
        inner = torchopt.sgd(lr=LR)
        state = inner.init(params)
        for _ in range(steps):
            at = params
            if order == "first":
                at = {name: p.detach() for name, p in params.items()}
            grads = torch.func.grad(loss_fn)(at, *support)
            updates, state = inner.update(grads, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return loss_fn(params, *query)

    def gradient() -> Gradient:
        net.zero_grad()
        losses = torch.vmap(task_loss, in_dims=(None, 0, 0))(
            meta_params, problem.support, problem.query
        )
        losses.mean().backward()
        return [p.grad for p in meta_params.values()]

    return gradient


def with_learn2learn(problem: Problem, order: str, steps: int = STEPS) -> Call:
    """As in its examples/vision/maml_omniglot.py: a clone for each task, a backward of its own."""
    import learn2learn

    net, num_tasks = problem.net, problem.num_tasks()
    maml = learn2learn.algorithms.MAML(net, lr=LR, first_order=order == "first")

    def gradient() -> Gradient:
        net.zero_grad()
        for i in range(num_tasks):
            clone = maml.clone()
            for _ in range(steps):
                clone.adapt(problem.criterion(clone(problem.support[0][i]), problem.support[1][i]))
            query = problem.criterion(clone(problem.query[0][i]), problem.query[1][i])
            (query / num_tasks).backward()
        return [p.grad for p in net.parameters()]

    return gradient


PEERS = {
    "higher": with_higher,
    "TorchOpt": with_torchopt,
    "TorchOpt, vmap": with_torchopt_vmap,
    "learn2learn": with_learn2learn,
}
WAYS = {
    **PEERS,
    "fmeta": with_fmeta,
    "fmeta, compiled": lambda *args: with_fmeta(*args, compile=True),
}


def warm_and_call(
    way: str, problem: str, order: str, num_tasks: int, steps: int, checkpoint: str | None = None
) -> tuple[Call, Call]:
    """For `_timing.peak_memory`: one task and one step first, then the real thing."""
    warnings.filterwarnings("ignore", category=FutureWarning)

    def call(num_tasks: int, steps: int) -> Call:
        if way == "fmeta":
            return with_fmeta(PROBLEMS[problem](num_tasks), order, steps, checkpoint=checkpoint)
        return WAYS[way](PROBLEMS[problem](num_tasks), order, steps)

    return call(2, 1), call(num_tasks, steps)


def compare(name: str, order: str, num_tasks: int, ways: list[str], rounds: int) -> list[Any]:
    """Rows of one problem, order and number of tasks; the ways take turns."""
    problem = PROBLEMS[name](num_tasks)
    calls = {way: WAYS[way](problem, order) for way in ways}
    exact = in_double(PROBLEMS[name](2))
    check_equal({w: WAYS[w](exact, order) for w in ways if w != "fmeta, compiled"}, 1e-8)
    check_equal(calls, EQUAL[name])
    for _ in range(30 if name == "sinusoid" else 32 // num_tasks):
        calls["fmeta"]()  # whose operations are recorded after 30 meta-batches, or images' tasks
    recorded = {"fmeta": calls["fmeta"], "not recorded": with_fmeta(problem, order, record=False)}
    check_equal(recorded, 0.0)
    seconds = _timing.median_times(calls, rounds, warmup=1 if name == "sinusoid" else 0, turn=TURN)
    loops = [s for way, s in seconds.items() if way in PEERS and "vmap" not in way]
    batched = [s for way, s in seconds.items() if way in PEERS]
    return [
        {
            "problem": name,
            "order": order,
            "tasks": num_tasks,
            "way": way,
            "CPU ms": 1e3 * s,
            "episodes / CPU s": num_tasks / s,
            "speed / fastest loop": min(loops) / s,
            "speed / fastest peer": min(batched) / s,
            "peak MB": _timing.peak_memory("fewshot", "warm_and_call", way, *case) / _timing.MB,
        }
        for way, s in seconds.items()
        for case in [(name, order, num_tasks, STEPS)]
    ]


def many_steps(name: str, num_tasks: int, steps: int) -> list[dict[str, Any]]:
    """Peak memory of many inner steps of second order with and without a checkpoint."""
    problem = PROBLEMS[name](num_tasks)
    plain, sqrt = (
        with_fmeta(problem, "second", steps, checkpoint=checkpoint) for checkpoint in (None, "sqrt")
    )
    check_equal({"plain": plain, "sqrt": sqrt}, EQUAL[name])
    seconds = _timing.median_times({"None": plain, "sqrt": sqrt}, 1, warmup=0)
    memory = {
        c: _timing.peak_memory(
            "fewshot", "warm_and_call", "fmeta", name, "second", num_tasks, steps, c
        )
        for c in (None, "sqrt")
    }
    return [
        {
            "problem": name,
            "tasks": num_tasks,
            "inner steps": steps,
            "checkpoint": str(c),
            "CPU s": seconds[str(c)],
            "peak MB": memory[c] / _timing.MB,
            "memory / plain": f"1/{memory[None] / memory[c]:.1f}",
        }
        for c in (None, "sqrt")
    ]


def in_double(problem: Problem) -> Problem:
    def double(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = pair
        return x.double(), y.double() if y.is_floating_point() else y

    return problem._replace(
        net=copy.deepcopy(problem.net).double(),
        support=double(problem.support),
        query=double(problem.query),
    )


def check_equal(calls: dict[str, Call], tolerance: float) -> None:
    """Raises an AssertionError unless all gradients agree to so much of their largest number."""
    first, *others = [(way, [g.clone() for g in call()]) for way, call in calls.items()]
    scale = max(float(g.abs().max()) for g in first[1])
    for way, gradient in others:
        for i, (a, b) in enumerate(zip(gradient, first[1], strict=True)):
            torch.testing.assert_close(
                a, b, rtol=0, atol=tolerance * scale, msg=lambda m, w=way, i=i: f"{w}, {i}: {m}"
            )


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What the bars say of the rows with 32 tasks, second order."""
    found = []
    for row in rows:
        if row["tasks"] == 32 and row["order"] == "second" and row["way"].startswith("fmeta"):
            bar, stretch = BARS[row["problem"]]
            for beside in ("loop", "peer"):
                speed = row[f"speed / fastest {beside}"]
                verdict = (
                    "stretch met" if speed >= stretch else "met" if speed >= bar else "not met"
                )
                found.append(
                    f"{row['problem']}, {row['way']}: {speed:.2f} times the fastest {beside} (bar "
                    f"{bar}, stretch {stretch}): {verdict}"
                )
    return found


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # the peers'
    options = arguments()
    torch.set_num_threads(1)
    modules = {"higher": "higher", "learn2learn": "learn2learn"}
    missing = [w for w in PEERS if importlib.util.find_spec(modules.get(w, "torchopt")) is None]
    ways = [w for w in PEERS if w not in missing] + ["fmeta"]
    if len(ways) == 1:
        raise SystemExit("no peer is installed: python -m pip install higher torchopt")
    if options.compile:
        ways.append("fmeta, compiled")
    rounds = {"sinusoid": 3 if options.quick else 9, "cnn": 1 if options.quick else 3}
    rows, long = [], []
    for name in options.problems:
        for num_tasks in (2,) if options.quick else (4, 32):
            for order in ORDERS:
                turns = rounds[name]
                rows += compare(name, order, num_tasks, ways, turns)
                print(_timing.table(rows[-len(ways) :]), flush=True)
        tasks, steps = (2, 8) if options.quick else (4 if name == "cnn" else 32, LONG)
        long += many_steps(name, tasks, steps)
    print(f"\n{STEPS} inner steps; not installed: {', '.join(missing) or 'none'}\n")
    print(_timing.table(rows))
    print("\n" + "\n".join(verdicts(rows)) + "\n")
    print(_timing.table(long))
    print(f'\nbar of "sqrt" at {LONG} steps: {MEMORY_BAR} of the memory')
    _timing.finish(
        options.json,
        {
            "benchmark": "fewshot",
            "environment": _timing.environment("higher", "torchopt", "learn2learn"),
            "results": rows,
            "many steps": long,
        },
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument(
        "--compile", action="store_true", help="fmeta compiled, too: minutes of compilation"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
