"""Update rules as a few compiled kernels: what the rules share.

A rule's function of one tensor is cut where a number is needed that only a whole pass over the
tensor gives (a mean, a root mean square). Between two cuts everything (moments, features, the small
network) is elementwise, and Inductor makes one loop of it: features never leave the registers. The
network is written out unit by unit, since a matrix product would need its inputs in memory. The
same source gives C++ on a CPU and Triton on a GPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as _shapes
from torch.fx.experimental.proxy_tensor import make_fx

from fmeta._inductor import recorded_options, written_out_options
from fmeta._trace import recording

__all__ = [
    "FUSED_NUMEL",
    "compiled",
    "in_memory",
    "layer",
    "of_one_order",
    "one_loop",
    "recorded",
    "sums_of_squares",
]

# Smaller tensors are stacked and updated together, which no compiled loop would make faster.
FUSED_NUMEL = 2**13
# One for each number of axes, and for each set of axes of size 1.
_VARIANTS = 64


@functools.cache
def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` compiled, once a process, for tensors of any size.

    Args:
        fn: a function of a module: pure, of tensors, lists of tensors and numbers.
    """
    more: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        more["recompile_limit"] = _VARIANTS
    options = written_out_options()
    call = torch.compile(fn, fullgraph=True, dynamic=True, options=options, **more)

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        # Axes that are of one size by chance are not taken for one and the same.
        with _shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return call(*args)

    return run


@functools.cache
def recorded(
    fn: Callable[..., list[Tensor]],
    example: Callable[[torch.device, torch.dtype], Sequence[Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    by_cpp: bool = False,
) -> Callable[..., Sequence[Tensor]]:
    """``fn`` recorded and compiled, once a process, for contiguous tensors of any sizes.

    What is compiled knows no size of its tensors, so unlike with `torch.compile` nothing has to be
    looked at before a call, and nothing is compiled again for an axis of size 1: a call costs half
    as much, which is what counts for models of many small tensors.

    Args:
        fn: a function of a module, of contiguous tensors; it may change them in place.
        example: tensors to record it with; axes that may differ have different sizes above 1.
        by_cpp: whether the kernels are called from C++ on a CPU: a call of many is then cheaper.
    """
    more = recorded_options([torch.empty(0, device=device)]) if by_cpp else {}
    with recording, torch.inference_mode(False), torch.no_grad():
        graph = make_fx(fn, tracing_mode="symbolic")(*example(device, dtype))
        given = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        return torch._inductor.compile(graph, given, options={**_options(), **more})


def _options() -> dict[str, Any]:
    options, name = written_out_options(), "realize_reads_threshold"
    # Nothing is stored but what is said to be: not features, because they are used twice.
    return {**options, name: 10**6} if name in torch._inductor.list_options() else options


def in_memory(x: Tensor) -> Tensor:
    """``x``, which a compiled function is to store and not to compute again where it is used."""
    return torch.as_strided(x, x.shape, x.stride())


def layer(rows: Sequence[Tensor], w: Tensor, bias: Sequence[Tensor]) -> list[Tensor]:
    """``bias + w @ rows``, unit by unit.

    Args:
        rows: F features, each ``(*leaf)``.
        w: ``(units, F)``.
        bias: of each unit, to be broadcast over the leaf.
    """
    outputs = []
    for total, weights in zip(bias, w.unbind(0), strict=True):
        for row, weight in zip(rows, weights.unbind(0), strict=True):
            total = torch.addcmul(total, row, weight)
        outputs.append(total)
    return outputs


def of_one_order(sides: Sequence[Tensor], factored: tuple[int, int] | None) -> Sequence[Tensor]:
    """Factors and biases of rows and columns, those that lack the later axis first.

    A pass takes them alike, and torch would compile it again for other axes of size 1.

    Args:
        sides: factors of rows and of columns, biases of rows and of columns.
        factored: ``(d1, d0)``; rows lack d0, columns d1.
    """
    # None a view of something else, which torch would compile a pass again for.
    row_factor, col_factor, row_bias, col_bias = sides = [x.clone() for x in sides]
    if factored is None or factored[0] < factored[1]:
        return sides
    return col_factor, row_factor, col_bias, row_bias


def one_loop(row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros of the shapes of what is known of rows and columns.

    Where they are added, a loop has the axes that rows and columns give it. Without, torch takes a
    contiguous tensor as a line of numbers, and has a loop of its own for what reads nothing else.
    """
    return torch.zeros_like(row), torch.zeros_like(col)


def sums_of_squares(rows: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """Sum of squares of each row over ``dims``, which stay as size 1."""
    return [row.square().sum(tuple(dims), keepdim=True) for row in rows]
