"""`plan_memory`: the bytes that an unroll will hold, before it is run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._live_bytes import LiveBytes
from fmeta._scan import _check_schedule, loop_length, segment_size, treeverse_plan
from fmeta._unroll import unroll
from fmeta.combinators._chunked import chunked
from fmeta.optimizer import Optimizer, check_optimizer_type

__all__ = ["MemoryPlan", "PlannedUnroll", "plan_memory"]

Tree = Any

_CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": "both"},
    {"mixed_mode": True},
    {"checkpoint": "sqrt"},
    {"checkpoint": "sqrt", "recompute": "both"},
    {"checkpoint": "sqrt", "mixed_mode": True},
    {"checkpoint": "sqrt", "mixed_mode": "keep_gradients"},
    {"checkpoint": 10},
    {"first_order": True, "checkpoint": "sqrt"},
)
# Measured on long unrolls on a CPU: nodes of the graph, the tensors' own records, rounding.
_EACH = 1500
_OPTIONS = ("checkpoint", "mixed_mode", "recompute", "first_order", "chunked")


class PlannedUnroll(NamedTuple):
    """One choice of options.

    Attributes:
        options: keywords of `unroll`; and ``chunked``, the ``coordinates`` of `fmeta.chunked`.
        bytes: most bytes alive at once in the forward and backward pass, beside what goes in.
        forward_passes: how often a step of the model is run forward under this ``checkpoint``, at
            most.
        bookkeeping: bytes that autograd and the allocator take on the host beside these tensors,
            roughly: what counts where there are many small ones.
    """

    options: dict[str, Any]
    bytes: int
    forward_passes: int
    bookkeeping: int = 0


class MemoryPlan(NamedTuple):
    """What `plan_memory` found; printed, it is a table.

    Attributes:
        choices: one `PlannedUnroll` for each choice, in the order asked for.
        horizon: number of steps planned for.
        inputs: bytes of the parameters and batches that go in, which are not part of the others.
        counted_on: ``"meta"``, or ``"real"`` where steps were run on the tensors themselves.
    """

    choices: tuple[PlannedUnroll, ...]
    horizon: int
    inputs: int
    counted_on: str

    def within(self, limit: float) -> tuple[PlannedUnroll, ...]:
        """The choices that hold at most ``limit`` bytes, those with fewer forward passes first."""
        fit = [c for c in self.choices if c.bytes <= limit]
        return tuple(sorted(fit, key=lambda c: (c.forward_passes, c.bytes)))

    def __str__(self) -> str:
        names = [", ".join(f"{k}={v!r}" for k, v in c.options.items()) or "-" for c in self.choices]
        rows = [("options", "holds", "relative", "forward passes")]
        first = max(self.choices[0].bytes, 1)
        for name, c in zip(names, self.choices, strict=True):
            rows.append((name, _shown(c.bytes), f"{c.bytes / first:.3g}", str(c.forward_passes)))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            row[0].ljust(widths[0])
            + "".join(f"  {x:>{w}}" for x, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        head = f"{self.horizon} steps; {_shown(self.inputs)} go in (counted on {self.counted_on})"
        return "\n".join([head, *lines])


def plan_memory(
    optimizer: Optimizer,
    loss_fn: Callable[..., Any],
    opt_params: Tree,
    model_params: Tree,
    batches: Tree,
    *,
    horizon: int | None = None,
    choices: Sequence[Mapping[str, Any]] = _CHOICES,
    wrt: str = "opt_params",
    outer: str = "backward",
    on: str = "auto",
    **arguments: Any,
) -> MemoryPlan:
    """Predicts the bytes that `unroll` and its meta-gradient hold, for each choice of options.

    A few short unrolls are run and the bytes of their tensors counted, operation by operation; the
    rest is arithmetic: the peak grows by the same for each further step whose graph is kept and
    for each further state (parameters and hidden state) that a schedule keeps, and how many of
    these there are is known. They run on ``meta`` tensors, which have no values, take no memory and
    next to no time, so that what does not fit can be planned.

    ``bytes`` are those of tensors; ``bookkeeping`` is an estimate of 1.5 kB for each tensor held.
    What kernels take within one operation is in neither, nor are the interpreter and the libraries
    (about 300 MB). On a CPU the resident memory grows by more than both, by how much is the
    allocator's affair: glibc keeps freed blocks, with holes between those in use (measured: 1.1 to
    3 times as much). With ``MALLOC_MMAP_THRESHOLD_=65536`` in the environment of the process they
    go back to the system, which takes time (measured: 1.0 to 1.5 times as much).

    Args:
        optimizer, loss_fn, opt_params, model_params, batches: as in `unroll`.
        horizon: number of steps to plan for; default: of the batches.
        choices: dicts with some of ``checkpoint``, ``mixed_mode``, ``recompute``, ``first_order``
            (as in `unroll`) and ``chunked`` (the coordinates of `fmeta.chunked`).
        wrt: ``"opt_params"``, ``"model_params"`` or ``"both"``: what the meta-gradient is taken of.
        outer: ``"backward"`` for ``.backward()`` and `torch.autograd.grad`, ``"grad"`` for
            `torch.func.grad`, which holds more.
        on: ``"meta"``; ``"real"``, for losses that close over tensors with values or look at
            values: then up to nine real steps are run; ``"auto"`` tries the first, then the second.
        **arguments: further ones of `unroll` (``loss_args``, ``model_state``, ``extras``, ...).

    Returns:
        A `MemoryPlan`; ``print`` it.

    Raises:
        ValueError: for unknown options or arguments.

    Example:
        >>> import torch, fmeta
        >>> loss = lambda p, x: (x @ p["w"]).square().mean()
        >>> rule = fmeta.learn(fmeta.optimizers.adam, {"lr": "log"})
        >>> plan = fmeta.plan_memory(
        ...     rule, loss, rule.init(), {"w": torch.ones(64, 64)}, torch.ones(1, 8, 64),
        ...     horizon=900, choices=[{}, {"checkpoint": "sqrt"}])
        >>> plan.choices[1].bytes < plan.choices[0].bytes / 10
        True
    """
    check_optimizer_type(optimizer, "optimizer")
    _check(choices, wrt, outer, on)
    total = loop_length(batches)
    horizon = total if horizon is None else horizon
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise ValueError(f"horizon must be a positive integer, got {horizon!r}")
    arguments.setdefault("num_steps", horizon)
    given = (opt_params, model_params, batches, arguments)
    counted_on = "real"
    if on != "real":
        try:
            held = _Held(optimizer, loss_fn, _as_meta(given), wrt, outer)
            held.peak(1, {})
            counted_on = "meta"
        except Exception as error:  # of any kind: it depends on what the loss does
            if on == "meta":
                first = (str(error).splitlines() or [""])[0]
                raise ValueError(
                    "the unroll cannot be run on meta tensors, which have no values "
                    f"({type(error).__name__}: {first}): "
                    'pass what the loss reads through `loss_args`, or give on="real"'
                ) from error
    if counted_on == "real":
        held = _Held(optimizer, loss_fn, given, wrt, outer)
    planned = [held.planned(dict(choice), horizon) for choice in choices]
    return MemoryPlan(tuple(planned), horizon, _bytes(given[:3]), counted_on)


class _Held:
    """The peak of bytes of short unrolls, and that of long ones by arithmetic."""

    def __init__(self, optimizer: Optimizer, loss_fn: Any, given: Tree, wrt: str, outer: str):
        self.optimizer, self.loss_fn, self.given = optimizer, loss_fn, given
        self.wrt, self.outer = wrt, outer
        self.found: dict[str, tuple[int, int]] = {}  # choices share their short unrolls

    def planned(self, options: dict[str, Any], horizon: int) -> PlannedUnroll:
        carry = self.cotangent()
        held, passes = self.grown(options, horizon, 0, float(_bytes(carry)))
        count = sum(x is not None for x in trees.leaves(carry))
        tensors, _ = self.grown(options, horizon, 1, float(count))
        return PlannedUnroll(options, round(held), passes, round(tensors * _EACH))

    def grown(
        self, options: dict[str, Any], horizon: int, which: int, cotangent: float
    ) -> tuple[float, int]:
        """Bytes (``which`` = 0) or tensors (1) at the peak of a long unroll; forward passes."""
        schedule = options.get("checkpoint")
        rest = {k: v for k, v in options.items() if k != "checkpoint"}

        keeps = options.get("mixed_mode") == "keep_gradients" and self.optimizer.reads_grads
        kept = self.kept() if keeps and schedule is not None and which == 0 else 0

        def at(steps: int, schedule: Any = None) -> int:
            return self.peak(steps, rest, schedule)[which] - steps * kept

        if schedule is None:
            # The first steps and the last hold less: nothing comes before them, or after.
            low, high = at(4), at(8)
            return low + (high - low) / 4 * (horizon - 4), 1
        # Schedules keep states and the graphs of a few steps. What one more of each costs shows in
        # three short loops: "sqrt" cuts 5 and 8 steps into pieces of one, 10 into five of two.
        five, eight, ten = (at(t, "sqrt") for t in (5, 8, 10))
        state = (eight - five) / 3
        graph, start = ten - five, five - 4 * state + horizon * kept
        if schedule == "sqrt":
            size = segment_size(horizon)
            count = -(-horizon // size)
            most = max(
                (count - 1) * state + (min(size, horizon - (count - 1) * size) - 1) * graph,
                (count - 2) * state + (size - 1) * graph if count > 1 else 0,
            )
            return start + most, 1 if keeps else 2
        depth, stride = treeverse_plan(horizon, schedule)
        # Each further level of nesting holds the cotangent of a state while it waits.
        most = _treeverse_cost(schedule, depth, stride, horizon, (state, cotangent, graph))
        return start - cotangent + most, 1 if keeps else depth + 2

    def kept(self) -> int:
        """Bytes of a step's gradient, loss and model state."""
        _, model_params, _, arguments = self.given
        one = next(x for x in trees.leaves(model_params) if _is_floating(x))
        return _bytes((model_params, arguments.get("model_state"))) + one.element_size()

    def cotangent(self) -> Tree:
        """What of a state has a cotangent."""
        _, model_params, _, arguments = self.given
        carry = (model_params, self.hidden(), arguments.get("model_state"))
        return trees.map(lambda x: x if _is_floating(x) else None, carry)

    def hidden(self) -> Tree:
        opt_params, model_params, _, arguments = self.given
        if arguments.get("hidden") is not None:
            return arguments["hidden"]
        return self.optimizer.init_hidden(
            opt_params, model_params, num_steps=arguments["num_steps"]
        )

    def peak(self, steps: int, options: dict[str, Any], schedule: Any = None) -> tuple[int, int]:
        """Bytes, and tensors, alive at most in a short unroll and its meta-gradient."""
        key = repr((steps, sorted(options.items()), schedule))
        if key not in self.found:
            self.found[key] = self._peak(steps, options, schedule)
        return self.found[key]

    def _peak(self, steps: int, options: dict[str, Any], schedule: Any) -> tuple[int, int]:
        options = dict(options)
        coordinates = options.pop("chunked", None)
        optimizer = self.optimizer if coordinates is None else chunked(self.optimizer, coordinates)
        opt_params, model_params, batches, arguments = self.given
        leading = {k: arguments[k] for k in ("extras", "eval_batches") if k in arguments}
        if callable(leading.get("extras")):
            leading.pop("extras")
        repeated, named = trees.map(
            lambda x: x[:1].expand(steps, *x.shape[1:]) if isinstance(x, Tensor) else x,
            (batches, leading),
        )
        arguments = {**arguments, **named}
        both = {"opt": opt_params, "model": model_params}

        def meta_loss(chosen: Tree) -> Tensor:
            now = {**both, **chosen}
            run = unroll(
                optimizer,
                self.loss_fn,
                now["opt"],
                now["model"],
                repeated,
                checkpoint=schedule,
                **arguments,
                **options,
            )
            return run.losses.sum()

        names = {"opt_params": ("opt",), "model_params": ("model",)}.get(self.wrt, ("opt", "model"))
        chosen = {k: trees.map(_leaf, both[k]) for k in names}
        count = LiveBytes(chosen, self.given, repeated, named)
        with count:
            if self.outer == "grad":
                torch.func.grad(meta_loss)(chosen)
            else:
                value = meta_loss(chosen)
                wanted = [x for x in trees.leaves(chosen) if x.requires_grad]
                if value.requires_grad:
                    torch.autograd.grad(value, wanted, allow_unused=True)
        return count.peak, count.most


def _treeverse_cost(
    snapshots: int, depth: int, stride: int, total: int, costs: tuple[float, float, float]
) -> float:
    """Bytes that binomial checkpointing keeps where it keeps most; follows `scan`'s recursion."""
    state, cotangent, graph = costs

    @functools.cache
    def most(snapshots: int, depth: int, total: int) -> float:
        blocks = -(-total // stride)
        if blocks == 1:
            return cotangent + (total - 1) * graph
        if snapshots == 0 or depth == 0:
            return (total - 1) * graph
        sizes: list[int] = []
        while (left := total - sum(sizes)) > 0:
            s = max(snapshots - len(sizes), 0)
            room = math.comb(s + depth - 1, s) if s else blocks
            sizes.append(min(max(room, 1) * stride, left))
        return max(
            i * state + cotangent + most(max(snapshots - i, 0), depth - 1, n)
            for i, n in enumerate(sizes)
        )

    return most(snapshots, depth, total)


def _leaf(x: Any) -> Any:
    if not _is_floating(x):
        return x
    return x.detach().requires_grad_()


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _as_meta(tree: Tree) -> Tree:
    return trees.map(lambda x: x.detach().to("meta") if isinstance(x, Tensor) else x, tree)


def _bytes(tree: Tree) -> int:
    return sum(x.numel() * x.element_size() for x in trees.leaves(tree) if isinstance(x, Tensor))


def _shown(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"


def _check(choices: Sequence[Mapping[str, Any]], wrt: str, outer: str, on: str) -> None:
    for choice in choices:
        unknown = sorted(set(choice) - set(_OPTIONS))
        if unknown:
            raise ValueError(
                f"unknown option {unknown[0]!r} in choices: there are {', '.join(_OPTIONS)}; what "
                "is the same for all choices is an argument of its own"
            )
        _check_schedule(choice.get("checkpoint"))
    if not choices:
        raise ValueError("choices is empty: give at least one dict of options, such as {}")
    known = {
        "wrt": (wrt, ("opt_params", "model_params", "both")),
        "outer": (outer, ("backward", "grad")),
        "on": (on, ("auto", "meta", "real")),
    }
    for name, (value, options) in known.items():
        if value not in options:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}"
            )
