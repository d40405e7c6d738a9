"""`scan`: a loop as a pure function, with checkpoint schedules that compose with torch.func."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import _guard, trees
from fmeta._remat import remat

__all__ = ["scan"]

Tree = Any
Body = Callable[..., tuple[Tree, Tree]]

# Nesting deeper than this would overflow the C stack of autograd; a tiny number of snapshots over a
# long loop therefore stores the graph of a few steps at the innermost level instead.
_MAX_DEPTH = 24

CURE = (
    "in `scan` through `consts`, in `unroll` through `loss_args` (what the loss or a function of "
    "`extras` reads) or `opt_params`; make a hyper-parameter learnable with `fmeta.learn`"
)


def scan(
    body: Body,
    carry: Tree,
    xs: Tree,
    *,
    consts: Sequence[Tree] = (),
    length: int | None = None,
    checkpoint: str | int | None = None,
) -> tuple[Tree, Tree]:
    """Runs ``carry, y = body(carry, x, *consts)`` over the leading dimension of ``xs``.

    ``checkpoint`` trades memory for time in the backward pass; values and gradients are the same
    under every choice, and it composes with ``grad``, ``vjp``, ``jvp``, ``vmap`` in any nesting and
    with ``.backward()``. With T steps, it keeps

    - ``None``: the graph of every step;
    - ``"sqrt"``: about 2 sqrt(T) carries and the graph of sqrt(T) / 2 steps, for one more forward
      pass. The default worth having for long loops;
    - an ``int`` s: s carries at a time (binomial checkpointing) and the graph of b = max(1, s // 8)
      steps, for up to r + 1 more forward passes, where r is the least number with
      C(s + r, s) >= T / b.

    For derivatives of higher order the recomputations multiply, most with few snapshots.

    Under ``checkpoint`` everything that is being differentiated or batched must be an argument
    (``carry``, ``xs``, ``consts``), and the body must not draw random numbers: both are checked by
    running one step on stand-ins first, and refused.

    Args:
        body: pure function ``(carry, x, *consts) -> (carry, y)``; trees of tensors.
        carry: initial state, tree of tensors (integers too).
        xs: tree of tensors with leading dimension T; or None, with ``length``.
        consts: trees that every step reads.
        length: T, when there are no ``xs`` (otherwise it must agree).
        checkpoint: None, ``"sqrt"`` or a positive number of snapshots.

    Returns:
        ``(carry, ys)``: the last carry, and the ``y`` of all steps stacked, leading dimension T.

    Raises:
        ValueError: T = 0, leading dimensions that differ (with the path), an unknown checkpoint
            schedule, a closed-over traced tensor or random numbers under ``checkpoint``.

    Example:
        >>> grow = lambda c, x, rate: (c * rate + x, c)
        >>> scan(grow, torch.tensor(1.0), torch.ones(3), consts=(torch.tensor(2.0),))
        (tensor(15.), tensor([1., 3., 7.]))

    Reference:
        sqrt: Chen et al. 1604.06174; binomial: Griewank and Walther, "Revolve" (2000).
    """
    total = loop_length(xs, length)
    consts = checked_args(consts, "consts")
    _check_schedule(checkpoint)
    if checkpoint is None:
        return _plain(body, total, carry, xs, consts)
    first = trees.map(lambda x: x[0] if isinstance(x, Tensor) else x, xs)
    _guard.refuse_closures_and_noise(_watched(body), carry, first, *consts, cure=CURE)
    if checkpoint == "sqrt":
        return _segments(body, segment_size(total), total, carry, xs, consts)
    snapshots = int(checkpoint)
    depth, stride = treeverse_plan(total, snapshots)
    return _treeverse(body, snapshots, depth, stride, total, carry, xs, consts)


def segment_size(total: int) -> int:
    """How many steps ``"sqrt"`` recomputes at once."""
    # The graph of a step holds several times what a carry does (inner activations and gradients
    # beside parameters and moments), so segments half as long as sqrt(T) balance the two.
    return max(1, round(math.sqrt(total) / 2))


def treeverse_plan(total: int, snapshots: int) -> tuple[int, int]:
    """Levels of recomputation, and steps whose graph is kept at once, with so many snapshots."""
    # The graph of a step holds about four carries, so these are half of what the snapshots hold.
    stride = max(1, snapshots // 8)
    while _depth(-(-total // stride), snapshots) > _MAX_DEPTH:
        stride += 1
    return _depth(-(-total // stride), snapshots), stride


def _plain(body: Body, total: int, carry: Tree, xs: Tree, consts: tuple[Tree, ...]) -> Any:
    leaves, spec = trees.flatten(xs)
    # One unbind instead of T index operations: a third of the calls, one backward node.
    columns = [x.unbind(0) if isinstance(x, Tensor) else (x,) * total for x in leaves]
    ys = []
    for t in range(total):
        result = body(carry, trees.unflatten(spec, [c[t] for c in columns]), *consts)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"the body must return (carry, y), got a {type(result).__name__}: return "
                "(carry, ()) when there is nothing to stack"
            )
        new, y = result
        if t == 0 and not _same_structure(new, carry):
            raise TypeError(
                f"the body changed the structure of the carry, from the paths {trees.paths(carry)} "
                f"to {trees.paths(new)}: it must return what it got, with new values"
            )
        carry = new
        ys.append(y)
    return carry, _joined(ys, torch.stack)


def _segments(
    body: Body, size: int, total: int, carry: Tree, xs: Tree, consts: tuple[Tree, ...]
) -> tuple[Tree, Tree]:
    """Consecutive pieces of the loop, each recomputed as a whole."""
    sizes = [min(size, total - start) for start in range(0, total, size)]
    parts = []
    for n, piece in zip(sizes, _split(xs, sizes), strict=True):
        carry, ys = remat(functools.partial(_plain, body, n))(carry, piece, consts)
        parts.append(ys)
    return carry, _joined(parts, torch.cat)


def _treeverse(
    body: Body,
    snapshots: int,
    depth: int,
    stride: int,
    total: int,
    carry: Tree,
    xs: Tree,
    consts: tuple[Tree, ...],
) -> tuple[Tree, Tree]:
    """Binomial checkpointing as nested recomputation.

    A block may be recomputed ``depth`` times and use ``snapshots`` further carries; its first part
    goes one level deeper, the rest starts from one snapshot more. Lengths count ``stride`` steps.
    """
    blocks = -(-total // stride)
    if blocks == 1:
        return remat(functools.partial(_plain, body, total))(carry, xs, consts)
    if snapshots == 0 or depth == 0:
        return _plain(body, total, carry, xs, consts)
    sizes: list[int] = []
    while (left := total - sum(sizes)) > 0:
        s = max(snapshots - len(sizes), 0)
        room = math.comb(s + depth - 1, s) if s else blocks
        sizes.append(min(max(room, 1) * stride, left))
    parts = []
    for i, (n, piece) in enumerate(zip(sizes, _split(xs, sizes), strict=True)):
        inner = functools.partial(_treeverse, body, max(snapshots - i, 0), depth - 1, stride, n)
        carry, ys = remat(inner)(carry, piece, consts)
        parts.append(ys)
    return carry, _joined(parts, torch.cat)


def _depth(blocks: int, snapshots: int) -> int:
    depth = 0
    while math.comb(snapshots + depth, snapshots) < blocks:
        depth += 1
    return depth


def _split(xs: Tree, sizes: list[int]) -> list[Tree]:
    """Consecutive pieces of ``xs``; by one split, whose backward is one concatenation."""
    leaves, spec = trees.flatten(xs)
    columns = [x.split(sizes) if isinstance(x, Tensor) else (x,) * len(sizes) for x in leaves]
    return [trees.unflatten(spec, [c[i] for c in columns]) for i in range(len(sizes))]


def _watched(body: Body) -> Body:
    """The body, refusing a Python number in the carry that changes (under checkpoint)."""

    def watched(carry: Tree, *args: Any) -> tuple[Tree, Tree]:
        result = body(carry, *args)
        if isinstance(result, tuple) and len(result) == 2 and _same_structure(carry, result[0]):
            _guard.refuse_changing_numbers(carry, result[0])
        return result

    return watched


def _same_structure(a: Tree, b: Tree) -> bool:
    if torch.compiler.is_compiling():  # a tracer checks the carry by itself
        return True
    return bool(trees.flatten(a)[1] == trees.flatten(b)[1])


def _joined(ys: list[Tree], join: Callable[[list[Tensor]], Tensor]) -> Tree:
    columns = [trees.leaves(y) for y in ys]
    for path, y in zip(trees.paths(ys[0]), columns[0], strict=True):
        if y is not None and not isinstance(y, Tensor):
            raise TypeError(
                f"y at path {path} is {y!r}, but what a step returns is stacked: return tensors "
                "(or None)"
            )
    return trees.unflatten(
        trees.flatten(ys[0])[1],
        [join(list(c)) if isinstance(c[0], Tensor) else c[0] for c in zip(*columns, strict=True)],
    )


def checked_args(args: Any, name: str) -> tuple[Tree, ...]:
    """The further arguments of a body or a loss as a tuple, or a TypeError."""
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"{name} must be a tuple of arguments, got a {type(args).__name__}: for one argument "
            f"give {name}=(it,)"
        )
    return tuple(args)


def _check_schedule(checkpoint: Any) -> None:
    if checkpoint is None or checkpoint == "sqrt":
        return
    if isinstance(checkpoint, bool) or not isinstance(checkpoint, int) or checkpoint < 1:
        raise ValueError(
            f'checkpoint must be None, "sqrt" or a positive number of snapshots, got {checkpoint!r}'
        )


def loop_length(xs: Tree, length: int | None = None) -> int:
    """The common leading dimension T of all tensors of ``xs``, or a ValueError with the path."""
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise TypeError(f"length must be an integer, got {length!r}")
    sizes = {}
    for path, x in zip(trees.paths(xs), trees.leaves(xs), strict=True):
        if not isinstance(x, Tensor):
            if x is not None:
                raise TypeError(f"xs at path {path} is a {type(x).__name__}, not a tensor")
            continue
        if x.ndim == 0:
            raise ValueError(f"xs at path {path} is a scalar: it needs a leading dimension T")
        sizes[path] = x.shape[0]
    if not sizes and length is None:
        raise ValueError("there is nothing to tell the number of steps: give xs or length")
    path, total = next(iter(sizes.items()), ("length", length))
    for other, size in sizes.items():
        if size != total:
            raise ValueError(f"xs at path {other} has {size} steps, but {path} has {total}")
    if length is not None and length != total:
        raise ValueError(f"length is {length}, but xs at path {path} has {total} steps")
    if total is None or total < 1:
        raise ValueError(f"a loop needs at least one step, got T = {total} (at path {path})")
    return int(total)
