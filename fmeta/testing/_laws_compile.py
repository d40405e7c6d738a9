"""Laws of tracing: nothing depends on values, and nothing but values changes between steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from functorch import make_fx  # type: ignore[import-untyped]
from torch import Tensor
from torch.func import grad

from fmeta import trees
from fmeta.optimizer import Hidden
from fmeta.testing._case import Case, floating
from fmeta.testing._compare import assert_close, leaf_names
from fmeta.testing._registry import law

Tree = Any


@law(once=True)
def make_fx_traces(optimizer: Any, params: Tree, **setup: Any) -> None:
    """``functorch.make_fx`` traces a step, and the graph is right for other values too."""
    case = Case(optimizer, params, **setup).double()
    p, hidden = case.warm()
    (arguments, spec), (other, _) = (
        trees.flatten((case.opt_params, *rest))
        for rest in ((p, case.grads(2), hidden), (*_later(case, p, hidden),))
    )
    arguments, other = list(arguments), list(other)

    def step(*tensors: Tensor) -> tuple[Tree, Tree]:
        th, p, g, h = trees.unflatten(spec, tensors)
        return case.step(p, g, h, th)

    def flat_step(*tensors: Tensor) -> list[Tensor]:
        return trees.leaves(step(*tensors))

    graph = make_fx(flat_step)(*arguments)
    want, out_spec = trees.flatten(step(*other))
    got = trees.unflatten(out_spec, graph(*other))
    where = "from the graph traced on other values, beside a step"
    assert_close(got[0], trees.unflatten(out_spec, want)[0], "params", where)
    assert_close(got[1], trees.unflatten(out_spec, want)[1], "hidden", where)


@law(once=True)
def compiles_once(optimizer: Any, params: Tree, *, steps: int = 6, **setup: Any) -> None:
    """``torch.compile(step, fullgraph=True)`` compiles once for many steps, with equal values.

    Values are those of the traced graph, run as it is, so no C++ compiler is needed. Whatever was
    compiled before in the process is forgotten (`torch.compiler.reset`).
    """
    case = Case(optimizer, params, **setup)
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch.compiler.reset()
    try:
        step = torch.compile(case.optimizer.step, backend=backend, fullgraph=True)
        q, k = p, h = case.params, case.start(case.params)
        counts = []
        for t in range(steps):
            grads = case.grads(t)
            p, h = case.step(p, grads, h)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own
                q, k = step(case.opt_params, q, grads, k, **case.given(q))
            counts.append(compiled)
            where = f"after step {t + 1}, compiled"
            assert_close(q, p, "params", where, rtol=1e-6)
            assert_close(k, h, "hidden", where, rtol=1e-6)
    finally:
        torch.compiler.reset()
    again = [str(t + 1) for t in range(1, steps) if counts[t] > counts[t - 1]]
    assert counts[-1] == 1, (
        f"step was compiled {counts[-1]} times in {steps} steps (again in step "
        f"{', '.join(again)}): keep counts and everything else that changes as tensors in the "
        "hidden state"
    )


@law(once=True)
def runs_on_meta(optimizer: Any, params: Tree, **setup: Any) -> None:
    """On the ``meta`` device, which has no values, steps and meta-gradients have right kinds."""
    case = Case(optimizer, params, **setup)
    p, hidden = case.warm(1)
    meta = case.to("meta")
    q, state = meta.warm(1)
    for name, want, got in (("params", p, q), ("hidden", hidden, state)):
        names, flat = leaf_names(want, name), trees.leaves(want)
        assert names == leaf_names(got, name), f"{name} has another structure on the meta device"
        for leaf, x, y in zip(names, flat, trees.leaves(got), strict=True):
            if not isinstance(x, Tensor):
                continue
            # As torch does, a scalar on the CPU is let be where an optimizer is written by hand.
            scalar = y.ndim == 0 and not isinstance(state, Hidden)
            assert y.device.type == "meta" or scalar, (
                f"{leaf} is on {y.device} after a step on the meta device: build tensors on the "
                "device of the parameters"
            )
            assert (y.shape, y.dtype) == (x.shape, x.dtype), (
                f"{leaf} is {tuple(y.shape)}, {y.dtype} after a step on the meta device, but "
                f"{tuple(x.shape)}, {x.dtype} elsewhere"
            )
    x, rebuilt = floating(meta.opt_params, meta.params)
    grads = grad(lambda x: meta.objective(*rebuilt(x), steps=3))(x)
    for a, g in zip(x, grads, strict=True):
        assert (g.shape, g.dtype, g.device) == (a.shape, a.dtype, a.device), (
            f"the meta-gradient of a {tuple(a.shape)} tensor has shape {tuple(g.shape)}"
        )


def _later(case: Case, params: Tree, hidden: Tree) -> tuple[Tree, Tree, Tree]:
    params, hidden = case.step(params, case.grads(2), hidden)
    return params, case.grads(3), hidden
