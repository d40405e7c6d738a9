"""A pure function recorded once as a flat list of operations, then replayed.

A step under `vmap` spends a good part of its time on the transforms, on trees and on checks. What
is left of it after recording are torch's own operations, in the same order and with the same
results, bit for bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fmeta import trees
from fmeta._inductor import recorded_options
from fmeta._products import turn_products
from fmeta._strides import in_strides, is_spread_out, packed_strides

__all__ = [
    "VIEWS",
    "Traced",
    "edits",
    "equal",
    "compiling",
    "for_compiler",
    "is_compiled",
    "recording",
    "simplify",
    "uncompilable",
    "watched",
]

recording = threading.RLock()  # which is for one thread at a time

_for_compiler: ContextVar[bool] = ContextVar("_for_compiler", default=False)
_is_compiled: ContextVar[bool] = ContextVar("_is_compiled", default=False)


def for_compiler() -> bool:
    """Whether what runs now is recorded for a compiler and never differentiated.

    Then a rule does well to be written out number by number, which makes few loops without
    temporaries of it; where every operation is a call, it would be many more of them.
    """
    if torch.compiler.is_compiling():  # a step that the user compiles: it may be differentiated
        return False
    return _for_compiler.get()


def is_compiled() -> bool:
    """Whether what runs now is recorded for a compiler (differentiated or not), or compiled."""
    # The tracer knows no variables of a context.
    return torch.compiler.is_compiling() or _is_compiled.get()


@contextlib.contextmanager
def compiling(yes: bool, written_out: bool = False) -> Iterator[None]:
    """A context in which functions are told so, and whether they are never differentiated."""
    tokens = _is_compiled.set(yes), _for_compiler.set(yes and written_out)
    try:
        yield
    finally:
        _is_compiled.reset(tokens[0])
        _for_compiler.reset(tokens[1])


class _Watched(TorchDispatchMode):
    """Sees all operations and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def watched() -> TorchDispatchMode:
    """A context in which rules choose the form that a recording sees, and not another one."""
    return _Watched()


class Traced:
    """``fn`` with its operations recorded at a call for each structure and shapes.

    Only for functions of tensors that are pure: what they read from elsewhere is read once. (One
    that gives something else when it is called again is not replayed.) No derivative is taken of
    the replayed operations.

    Args:
        fn: ``fn(*trees) -> tree``; leaves are tensors.
        compile: hand what was recorded to `torch.compile`: faster still, and equal to rounding
            only, after a compilation of 15 seconds to two minutes. What cannot be recorded is an
            error.
        after: so many calls of each kind go to ``fn`` itself before one is recorded, which takes
            as long as many calls do.
        most: so many kinds are recorded, which takes memory; further ones go to ``fn`` itself.
        turned: whether products that are only read transposed are made so (`turn_products`), before
            they are compiled: for networks of linear layers, whose derivatives are full of them.
        written_out: whether rules see that they are recorded for a compiler (`for_compiler`): where
            they are not differentiated within ``fn``.
        carried: arguments ``carried[0]`` to ``carried[1] - 1`` are, in the next call, the first
            results of this one. What is compiled then takes them as it gives them, with their axes
            in the same order in memory; whatever else it is given is copied into that order.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        compile: bool = False,
        after: int = 0,
        most: int | None = None,
        turned: bool = False,
        written_out: bool = False,
        carried: tuple[int, int] = (0, 0),
    ) -> None:
        self.fn, self.compile, self.after, self.written_out = fn, compile, after, written_out
        self.most, self.turned, self.carried = most, turned, carried
        self.recorded: dict[Any, Any] = {}
        self.calls: Counter[Any] = Counter()

    def __call__(self, *args: Any) -> Any:
        flat, spec = trees.flatten(args)
        key = (spec, tuple((x.shape, x.dtype, x.device) for x in flat))
        if self.compile:  # one that is given twice, or is a Parameter, would be compiled for anew
            flat = [x.detach() for x in flat]
        with torch.no_grad():
            if key not in self.recorded:
                if self.most is not None and len(self.recorded) >= self.most:
                    return self.fn(*args)
                if self.calls[key] < self.after:
                    self.calls[key] += 1
                    return self.fn(*args)
                with recording, compiling(self.compile, self.written_out):
                    self.recorded[key] = self._record(flat, spec)
            replay, out_spec = self.recorded[key]
            if replay is None:
                return self.fn(*args)
            return trees.unflatten(out_spec, replay(*flat))

    def _record(self, flat: list[Tensor], spec: Any, again: bool = False) -> tuple[Any, Any]:
        if any(x.is_meta for x in flat):  # without values nothing tells a right recording
            return None, None
        out: list[Any] = []

        def flat_fn(*flat: Tensor) -> list[Tensor]:
            leaves, out_spec = trees.flatten(self.fn(*trees.unflatten(spec, flat)))
            out[:] = [out_spec]
            return leaves

        try:
            # Tensors of their own: of one that is given twice, both uses would be recorded as one.
            module = make_fx(flat_fn)(*(x.detach() for x in flat))
        except Exception as error:  # not recordable, or wrong: then the function itself says so
            if self.compile:
                flat_fn(*flat)
            return self._unrecorded(error)
        simplify(module)
        if _reads_storage(module):
            return self._unrecorded(None)
        results = module(*flat)
        with watched():
            same = equal(results, flat_fn(*flat))
        if not same:
            return self._unrecorded(None)
        if not self.compile:
            return _in_other_orders(module.forward, flat), out[0]
        strides = self._strides(flat, spec, results)
        given = [in_strides(x, s) for x, s in zip(flat, strides, strict=True)]
        if not again and any(a is not b for a, b in zip(flat, given, strict=True)):
            return self._record(given, spec, again=True)
        return self._compiled(module, given, strides), out[0]

    def _strides(self, flat: list[Tensor], spec: Any, results: list[Tensor]) -> list[Any]:
        """The strides in which what is compiled takes its arguments."""
        strides = [packed_strides(x) for x in flat]
        args, (first, last) = trees.unflatten(spec, flat), self.carried
        start, count = (len(trees.leaves(x)) for x in (args[:first], args[first:last]))
        for i, x in enumerate(results[:count], start):
            if x.shape == flat[i].shape:
                strides[i] = packed_strides(x)
        return strides

    def _compiled(self, module: Any, given: list[Tensor], strides: list[Any]) -> Any:
        if self.turned:
            turn_products(module)
        options = recorded_options(given, self.written_out)
        call = torch.compile(module, fullgraph=True, dynamic=False, options=options)

        def replay(*flat: Tensor) -> Any:
            return call(*map(in_strides, flat, strides))

        return replay

    def _unrecorded(self, error: Exception | None) -> tuple[None, None]:
        if self.compile:
            raise uncompilable() from error
        return None, None


def _in_other_orders(forward: Callable[..., Any], flat: list[Tensor]) -> Callable[..., Any]:
    """The call of a recorded module (its method: a call of a module costs as much as an operation).

    A view of these tensors need not be one where others of the same shapes lie in another order in
    memory: then, and from then on, the others are copied into this one.
    """
    strides, copied = [x.stride() for x in flat], False

    def replay(*flat: Tensor) -> Any:
        nonlocal copied
        if copied:
            return forward(*map(in_strides, flat, strides))
        try:
            return forward(*flat)
        except RuntimeError:
            given = list(map(in_strides, flat, strides))
            if all(a is b for a, b in zip(flat, given, strict=True)):
                raise
        copied = True
        return forward(*given)

    return replay


def uncompilable() -> ValueError:
    """What to raise for a function that cannot be recorded."""
    return ValueError(
        "the step cannot be compiled: it gives something else when it is called again, or "
        "depends on more than the shapes of tensors; leave compile=True out"
    )


VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.detach.default,
    torch.ops.aten._to_copy.default,
}


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all tensors are the same, bit for bit."""
    return all(
        torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(a, b, strict=True)
    )


def simplify(module: Any) -> None:
    """Drops views that change nothing, which transforms leave behind by the hundred."""
    for node in list(module.graph.nodes):
        if node.target in VIEWS and node.args and isinstance(node.args[0], torch.fx.Node):
            before = node.args[0]
            if _is_same(before, node) and not any(map(edits, (*node.users, *before.users))):
                node.replace_all_uses_with(before)
                module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _reads_storage(module: Any) -> bool:
    """Whether an input is read by its place in memory, which is another one at the next call."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.as_strided.default:
            base = node.args[0]
            while base.op == "call_function" and _is_view(base):
                base = base.args[0]
            if base.op == "placeholder":
                return True
    return False


def _is_view(node: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _is_same(a: Any, b: Any) -> bool:
    a, b = a.meta.get("val"), b.meta.get("val")
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and not is_spread_out(a)  # where strides do not tell axes apart
        and (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())
        and (a.dtype, a.device) == (b.dtype, b.device)
    )


def edits(node: Any) -> bool:
    """Whether an operation works in place: then what it is given must be a tensor of its own."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
