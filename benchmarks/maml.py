"""A MAML-style meta-gradient beside `higher` and TorchOpt: 5 inner steps, 32 tasks, second order.

The gradient, with respect to the initial parameters, of the mean query loss over the tasks after 5
steps of SGD on each task's support set: on sinusoids (net 1-40-40-1, relu) and on images (CNN of 4
blocks of 3x3x32 convolutions, 1x28x28, 5 ways, 1 shot, 15 query images). All ways are checked to
give equal gradients before they are timed.

    python -m pip install higher torchopt
    python benchmarks/maml.py [--quick] [--json PATH]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import _timing
import torch
from torch import Tensor, nn

import fmeta

STEPS = 5
LR = 0.01
# problem: (bar, stretch), as times the speed of the faster peer
BARS = {"sinusoid": (6.0, 8.0), "cnn": (0.9, 1.2)}

Gradient = list[Tensor]  # in the order of net.parameters()


class Problem(NamedTuple):
    """A net and tasks for it.

    Attributes:
        net: the module whose parameters are the initialisation.
        criterion: (output, target) -> scalar.
        support, query: pairs (x, y), leading dimension the tasks.
    """

    net: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]

    def num_tasks(self) -> int:
        return self.support[0].shape[0]


def sinusoid(num_tasks: int) -> Problem:
    g = torch.Generator().manual_seed(0)
    net = _seeded(
        nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)),
        g,
    )
    x = torch.rand(num_tasks, 20, 1, generator=g) * 10 - 5
    amplitude = torch.rand(num_tasks, 1, 1, generator=g) * 4.9 + 0.1
    phase = torch.rand(num_tasks, 1, 1, generator=g) * math.pi
    y = amplitude * torch.sin(x - phase)
    return Problem(net, nn.functional.mse_loss, (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))


def cnn(num_tasks: int, channels: int = 32, ways: int = 5) -> Problem:
    g = torch.Generator().manual_seed(0)
    blocks: list[nn.Module] = []
    for inputs in (1, channels, channels, channels):
        blocks += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    net = _seeded(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels, ways)), g)
    prototypes = torch.randn(num_tasks, ways, 1, 28, 28, generator=g)

    def images(each: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(ways).repeat_interleave(each).expand(num_tasks, -1)
        x = prototypes.repeat_interleave(each, 1)
        return x + 0.5 * torch.randn(x.shape, generator=g), y.contiguous()

    return Problem(net, nn.functional.cross_entropy, images(1), images(15 // ways))


def _seeded(net: nn.Module, g: torch.Generator) -> nn.Module:
    for p in net.parameters():
        scale = math.sqrt(2 / p[0].numel()) if p.ndim > 1 else 0.1
        p.data = torch.randn(p.shape, generator=g) * scale
    return net


def with_fmeta(
    problem: Problem, outer: str, tasks: str = "vmap", chunk_size: int | None = None
) -> Callable[[], Gradient]:
    """``outer`` is "backward" or "func", ``tasks`` "vmap" or "loop"."""
    apply, params, buffers = fmeta.functionalize(problem.net)
    sgd = fmeta.optimizers.sgd(LR)

    def loss_fn(p: Any, batch: Any) -> Tensor:
        return problem.criterion(apply(p, buffers, batch[0]), batch[1])

    def task_loss(params: Any, support: Any, query: Any) -> Tensor:
        batches = tuple(x.expand(STEPS, *x.shape) for x in support)
        return loss_fn(fmeta.unroll(sgd, loss_fn, {}, params, batches).params, query)

    def meta_loss(params: Any) -> Tensor:
        if tasks == "loop":
            losses = [
                task_loss(params, *parts)
                for parts in zip(
                    zip(*problem.support, strict=True),
                    zip(*problem.query, strict=True),
                    strict=True,
                )
            ]
            return torch.stack(losses).mean()
        batched = torch.vmap(task_loss, in_dims=(None, 0, 0), chunk_size=chunk_size)
        return batched(params, problem.support, problem.query).mean()

    def func() -> Gradient:
        return list(torch.func.grad(meta_loss)(params).values())

    def backward() -> Gradient:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        return list(torch.autograd.grad(meta_loss(leaves), list(leaves.values())))

    return func if outer == "func" else backward


def with_higher(problem: Problem) -> Callable[[], Gradient]:
    """As in its examples/maml-omniglot.py: task after task, each with a backward of its own."""
    import higher

    net, num_tasks = problem.net, problem.num_tasks()
    inner = torch.optim.SGD(net.parameters(), lr=LR)

    def gradient() -> Gradient:
        net.zero_grad()
        for i in range(num_tasks):
            with higher.innerloop_ctx(
                net, inner, copy_initial_weights=False, track_higher_grads=True
            ) as (fnet, diffopt):
                for _ in range(STEPS):
                    loss = problem.criterion(fnet(problem.support[0][i]), problem.support[1][i])
                    diffopt.step(loss)
                query = problem.criterion(fnet(problem.query[0][i]), problem.query[1][i])
                (query / num_tasks).backward()
        return [p.grad for p in net.parameters()]

    return gradient


def with_torchopt(problem: Problem) -> Callable[[], Gradient]:
    """As in its examples/few-shot/maml_omniglot.py: MetaSGD, task after task, one backward."""
    import torchopt

    net, num_tasks = problem.net, problem.num_tasks()
    meta_params = list(net.parameters())
    inner = torchopt.MetaSGD(net, lr=LR)

    def gradient() -> Gradient:
        for p in meta_params:
            p.grad = None
        losses = []
        start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        inner_start = torchopt.extract_state_dict(inner, by="reference")
        for i in range(num_tasks):
            for _ in range(STEPS):
                inner.step(problem.criterion(net(problem.support[0][i]), problem.support[1][i]))
            losses.append(problem.criterion(net(problem.query[0][i]), problem.query[1][i]))
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, inner_start)
        torch.stack(losses).mean().backward()
        return [p.grad for p in meta_params]

    return gradient


def with_torchopt_vmap(problem: Problem) -> Callable[[], Gradient]:
    """As in its examples/FuncTorch/maml_omniglot_vmap.py, with `torch.func` for functorch."""
    import torchopt

    net = problem.net
    meta_params = dict(net.named_parameters())

    def loss_fn(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return problem.criterion(torch.func.functional_call(net, params, (x,)), y)

    def task_loss(params: Any, support: Any, query: Any) -> Tensor:
        inner = torchopt.sgd(lr=LR)
        state = inner.init(params)
        for _ in range(STEPS):
            grads = torch.func.grad(loss_fn)(params, *support)
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


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # the peers'
    options = _timing.arguments(__doc__)
    missing = [name for name in ("higher", "torchopt") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"the peers are not installed: python -m pip install {' '.join(missing)}")
    torch.set_num_threads(1)
    num_tasks = 4 if options.quick else 32
    rounds = {"sinusoid": 3 if options.quick else 21, "cnn": 1 if options.quick else 5}
    rows, results = [], []
    for name, build in (("sinusoid", sinusoid), ("cnn", cnn)):
        problem = build(num_tasks)
        calls = {
            "higher": with_higher(problem),
            "TorchOpt": with_torchopt(problem),
            "TorchOpt, vmap": with_torchopt_vmap(problem),
            "fmeta, vmap, autograd outside": with_fmeta(problem, "backward"),
            "fmeta, vmap, func.grad outside": with_fmeta(problem, "func"),
            "fmeta, vmap by 8, autograd outside": with_fmeta(problem, "backward", chunk_size=8),
            "fmeta, loop, autograd outside": with_fmeta(problem, "backward", "loop"),
        }
        check_equal(calls)
        seconds = _timing.median_times(calls, rounds[name], warmup=0)
        peer = min(seconds["higher"], seconds["TorchOpt"])
        bar, stretch = BARS[name]
        for way, s in seconds.items():
            speed = peer / s
            results.append({"problem": name, "way": way, "seconds": s, "speed": speed})
            verdict = "stretch met" if speed >= stretch else "bar met" if speed >= bar else "no"
            rows.append(
                {
                    "problem": name,
                    "way": way,
                    "CPU ms": 1e3 * s,
                    "speed / faster loop": speed,
                    "speed / TorchOpt, vmap": seconds["TorchOpt, vmap"] / s,
                    "verdict": "" if options.quick or not way.startswith("fmeta") else verdict,
                }
            )
    print(
        f"{num_tasks} tasks, {STEPS} steps; the peers' way is task after task; bars: sinusoid 6 "
        "(stretch 8), cnn 0.9 (stretch 1.2) times the speed of the faster peer loop"
    )
    print(_timing.table(rows))
    _timing.finish(
        options.json,
        {
            "benchmark": "maml",
            "num_tasks": num_tasks,
            "environment": _timing.environment("higher", "torchopt"),
            "results": results,
        },
    )


def check_equal(calls: dict[str, Callable[[], Gradient]]) -> None:
    first = [g.clone() for g in next(iter(calls.values()))()]
    for way, call in calls.items():
        for i, (a, b) in enumerate(zip(call(), first, strict=True)):
            scale = float(b.abs().max())
            torch.testing.assert_close(
                a, b, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, w=way, i=i: f"{w}, {i}: {m}"
            )


if __name__ == "__main__":
    main()
