"""A pure function recorded together with its derivative, to be replayed inside autograd.

What is recorded is one flat list of operations: the values, and their derivative under cotangents
that are inputs too. Operations that the values do not need are the backward pass; what it reads of
the forward pass is kept in between.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from fmeta import trees
from fmeta._autodiff import inside_transform, is_differentiable
from fmeta._trace import VIEWS, compiling, edits, equal, recording, simplify, uncompilable, watched

__all__ = ["TracedWithGradient"]


class TracedWithGradient:
    """``fn`` and its gradient, recorded at the first call for each structure and shapes.

    As `fmeta._trace.Traced`, but the result can be differentiated once by autograd.

    Args:
        fn: ``fn(*trees) -> tree``; leaves are tensors.
        differentiated: number of leading arguments whose floating leaves have derivatives; the
            others are constants.
        compile: hand both passes to `torch.compile`. The backward pass then makes elementwise
            results again, which costs less than to read them from memory.
    """

    def __init__(
        self, fn: Callable[..., Any], differentiated: int, *, compile: bool = False
    ) -> None:
        self.fn, self.differentiated, self.compile = fn, differentiated, compile
        self.recorded: dict[Any, _Passes | None] = {}

    def __call__(self, *args: Any) -> Any:
        flat, spec = trees.flatten(args)
        count = len(trees.leaves(args[: self.differentiated]))
        if inside_transform() or any(x.requires_grad for x in flat[count:]):
            return self.fn(*args)
        key = (spec, tuple((x.shape, x.dtype, x.device) for x in flat))
        if key not in self.recorded:
            with recording, compiling(self.compile):
                self.recorded[key] = self._record(flat, spec, count)
        passes = self.recorded[key]
        if passes is None:
            return self.fn(*args)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in flat):
            found = passes.values(*(x.detach() for x in flat))
            return trees.unflatten(passes.spec, found[: passes.outputs])
        return trees.unflatten(passes.spec, _Replayed.apply(passes, *flat))

    def _record(self, flat: list[Tensor], spec: Any, count: int) -> _Passes | None:
        flat = [x.detach() for x in flat]
        learned = [i for i, x in enumerate(flat[:count]) if is_differentiable(x)]
        out: list[Any] = []

        def values(*flat: Tensor) -> list[Tensor]:
            leaves, out_spec = trees.flatten(self.fn(*trees.unflatten(spec, flat)))
            out[:] = [out_spec]
            return leaves

        def joint(*given: Tensor) -> list[Tensor]:
            inputs, cotangents = list(given[: len(flat)]), given[len(flat) :]
            with torch.enable_grad():
                for i in learned:
                    inputs[i] = inputs[i].detach().requires_grad_()
                leaves = values(*inputs)
                pairs = zip([x for x in leaves if is_differentiable(x)], cotangents, strict=True)
                seen = [(x, c) for x, c in pairs if x.requires_grad]
                grads: Sequence[Tensor] = torch.autograd.grad(
                    [x for x, _ in seen],
                    [inputs[i] for i in learned],
                    [c for _, c in seen],
                    allow_unused=True,
                    materialize_grads=True,
                )
            return [*(x.detach() for x in leaves), *grads]

        with torch.no_grad(), watched():
            leaves = values(*flat)  # what is wrong with the function itself, it says itself
        try:
            with torch.no_grad():
                smooth = [is_differentiable(x) for x in leaves]
                given = [*flat, *(torch.ones_like(x) for x in leaves if is_differentiable(x))]
                module = make_fx(joint)(*given)
                if any(map(edits, module.graph.nodes)):  # what passes are cut from must not
                    module = make_fx(functionalize(module))(*given)
                simplify(module)
                with watched():
                    same = equal(module(*given), joint(*given))
        except Exception as error:  # not recordable, or without a derivative
            if self.compile:
                raise uncompilable() from error
            return None
        if not same:
            if self.compile:
                raise uncompilable()
            return None
        *passes, kept = _cut(module, len(flat), len(leaves), again=self.compile)
        if self.compile:
            run = [torch.compile(m, fullgraph=True, dynamic=False) for m in passes]
        else:
            run = [m.forward for m in passes]
        return _Passes(run[0], run[1], out[0], len(leaves), smooth, learned, kept)


class _Passes(NamedTuple):
    """What was recorded.

    Attributes:
        values: ``(*inputs) -> [*outputs, *more]``.
        gradients: ``(*kept inputs, *more, *cotangents of floating outputs) -> gradients`` of the
            inputs ``learned``.
        spec: of the outputs.
        outputs: how many.
        smooth: which of them are floating.
        learned, kept: which inputs have derivatives, and which are needed for these.
    """

    values: Callable[..., Sequence[Tensor]]
    gradients: Callable[..., Sequence[Tensor]]
    spec: Any
    outputs: int
    smooth: list[bool]
    learned: list[int]
    kept: list[int]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: _Passes, *flat: Tensor) -> tuple[Tensor, ...]:
        # Detached: what requires grad would be compiled once more.
        found = passes.values(*(x.detach() for x in flat))
        outputs, more = found[: passes.outputs], found[passes.outputs :]
        ctx.passes, ctx.inputs = passes, len(flat)
        ctx.save_for_backward(*(flat[i] for i in passes.kept), *more)
        rough = [x for x, smooth in zip(outputs, passes.smooth, strict=True) if not smooth]
        ctx.mark_non_differentiable(*rough)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: what is replayed would be a constant in it
            raise RuntimeError("recorded steps can be differentiated once: leave compile=True out")
        passes = ctx.passes
        given = [c for c, smooth in zip(cotangents, passes.smooth, strict=True) if smooth]
        found = passes.gradients(*(x.detach() for x in ctx.saved_tensors), *given)
        grads: list[Tensor | None] = [None] * ctx.inputs
        for i, grad in zip(passes.learned, found, strict=True):
            grads[i] = grad
        return (None, *grads)


# -- cutting ---------------------------------------------------------------------------------------


def _cut(
    module: fx.GraphModule, inputs: int, outputs: int, *, again: bool
) -> tuple[fx.GraphModule, fx.GraphModule, list[int]]:
    """Forward and backward pass of a joint graph of inputs, then cotangents.

    Args:
        inputs, outputs: how many of the graph's are those of the forward pass.
        again: whether the backward pass makes elementwise results again.

    Returns:
        ``(forward, backward, kept)``: ``inputs -> (outputs, further results)``, ``(inputs that are
        kept, further results, cotangents) -> gradients``, and which inputs are kept.
    """
    nodes = list(module.graph.nodes)
    places = [n for n in nodes if n.op == "placeholder"]
    ends: Sequence[Any] = nodes[-1].args[0]
    results, grads = ends[:outputs], ends[outputs:]
    forward, _ = _needed(results, lambda n: False)

    def is_kept(node: fx.Node) -> bool:
        if node not in forward or not isinstance(node.meta.get("val"), Tensor):
            return False
        return node.op != "get_attr" and not (again and _is_elementwise(node))

    backward, ready = _needed(grads, is_kept)
    kept = [i for i, n in enumerate(places[:inputs]) if n in ready]
    more = [n for n in nodes if n in ready and n.op != "placeholder"]
    given = [*(places[i] for i in kept), *more, *places[inputs:]]
    return (
        _graph(module, places[:inputs], forward, [*results, *more]),
        _graph(module, given, backward, grads),
        kept,
    )


def _needed(
    ends: Sequence[Any], stop: Callable[[fx.Node], bool]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that these need, and those (inputs, too) where the search has stopped."""
    found: set[fx.Node] = set()
    stopped: set[fx.Node] = set()
    left = [n for n in ends if isinstance(n, fx.Node)]
    while left:
        node = left.pop()
        if node.op == "placeholder" or stop(node):
            stopped.add(node)
        elif node not in found:
            found.add(node)
            left.extend(node.all_input_nodes)
    return found, stopped


def _graph(
    module: fx.GraphModule, places: Sequence[fx.Node], inside: set[fx.Node], ends: Sequence[Any]
) -> fx.GraphModule:
    """The part of a graph that makes ``ends`` of ``places`` by the nodes ``inside``."""
    graph, known = fx.Graph(), {}
    for i, node in enumerate(places):
        known[node] = graph.placeholder(f"in_{i}")
        known[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node in inside:
            known[node] = graph.node_copy(node, known.__getitem__)
    graph.output([known[n] if isinstance(n, fx.Node) else n for n in ends])
    return fx.GraphModule(module, graph)


_MOVES = {
    *VIEWS,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze.dims,
    torch.ops.aten.select.int,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.t.default,
    torch.ops.aten.cat.default,
    torch.ops.aten.stack.default,
    torch.ops.aten.clone.default,
}


def _is_elementwise(node: fx.Node) -> bool:
    """Whether a result is cheaper made again than kept, in one loop with what reads it."""
    if node.target is operator.getitem:  # the i-th of several results
        return all(map(_is_elementwise, node.all_input_nodes))
    return node.target in _MOVES or torch.Tag.pointwise in getattr(node.target, "tags", ())
