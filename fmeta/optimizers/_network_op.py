"""The network of every coordinate as one operation, which the compiler writes out unit by unit.

Written out in operations on tensors, a network of U units would be U expressions of all features,
and torch goes over each feature again wherever it is used: with 32 units that takes hours. Here a
loop's body is made in one go, each feature once, and each unit once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["network"]

# Units that are summed up together: their sums and the features fit into the registers.
_TOGETHER = 4


def network(
    rows: Sequence[Tensor], bias: Sequence[Tensor], weights: Sequence[Tensor], units: Sequence[int]
) -> Tensor:
    """``d exp(e)`` of a network (ReLU) with the outputs d and e, for each coordinate.

    For functions that are recorded and compiled; without derivatives.

    Args:
        rows: F features, ``(B, o, k, i)``.
        bias: of the first layer in two parts, ``(B, units, o, k)`` and ``(B, units, k, i)``.
        weights: of the first layer ``(B, units, F)``; of the others ``(out, in)`` and ``(out)`` in
            turns.
        units: of the hidden layers.

    Returns:
        Shape ``(B, o, k, i)``.
    """
    _lower()
    given = list(rows), list(bias), list(weights), list(units)
    result: Tensor = torch.ops.fmeta.coordinate_network(*given)
    return result


@torch.library.custom_op(
    "fmeta::coordinate_network",
    mutates_args=(),
    schema="(Tensor[] rows, Tensor[] bias, Tensor[] weights, int[] units) -> Tensor",
    tags=[torch.Tag.flexible_layout],
)
def _network(
    rows: list[Tensor], bias: list[Tensor], weights: list[Tensor], units: list[int]
) -> Tensor:
    """Without the compiler: for tests."""
    x = torch.stack(rows, 1)
    y = torch.einsum("buf,bfoki->buoki", weights[0], x)
    y = y + bias[0].unsqueeze(-1) + bias[1].unsqueeze(2)
    for w, b in zip(weights[1::2], weights[2::2], strict=True):
        y = torch.einsum("vu,buoki->bvoki", w, y.relu()) + b[:, None, None, None]
    return y[:, 0] * y[:, 1].exp()


@_network.register_fake
def _(rows: list[Tensor], bias: list[Tensor], weights: list[Tensor], units: list[int]) -> Tensor:
    return rows[0].new_empty(rows[0].shape)


@functools.cache
def _lower() -> None:
    """Tells the compiler what the operation is."""
    import sympy  # type: ignore[import-untyped]
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import ops

    def total(start: list[Any], inputs: Sequence[Any], weight: Callable[[int, int], Any]) -> Any:
        """Sums of several units, in step."""
        sums = list(start)
        for j, x in enumerate(inputs):
            sums = [ops.add(y, ops.mul(x, weight(u, j))) for u, y in enumerate(sums)]
        return sums

    def lower(rows: list[Any], bias: list[Any], weights: list[Any], units: list[int]) -> Any:
        dtype, sizes = rows[0].get_dtype(), rows[0].get_size()
        load_rows, load_bias, load = ([x.make_loader() for x in xs] for xs in (rows, bias, weights))

        def at(which: int, *index: Any) -> Any:
            return load[which]([sympy.Integer(i) if isinstance(i, int) else i for i in index])

        def inner(index: Sequence[Any]) -> Any:
            b, o, k, i = index
            x = [f(index) for f in load_rows]
            zero = ops.constant(0.0, dtype)

            def first(u: int) -> Any:
                unit = sympy.Integer(u)
                return ops.add(load_bias[0]([b, unit, o, k]), load_bias[1]([b, unit, k, i]))

            y: list[Any] = []
            for block in _blocks(units[0]):
                y += total([first(u) for u in block], x, lambda u, j: at(0, b, block[u], j))  # noqa: B023
            for n, count in enumerate((*units[1:], 2)):
                x, y = [ops.maximum(unit, zero) for unit in y], []
                for block in _blocks(count):
                    start = [at(2 * n + 2, u) for u in block]
                    y += total(start, x, lambda u, j: at(2 * n + 1, block[u], j))  # noqa: B023
            return ops.mul(y[0], ops.exp(y[1]))

        return ir.Pointwise.create(
            device=rows[0].get_device(), dtype=dtype, inner_fn=inner, ranges=list(sizes)
        )

    register_lowering(torch.ops.fmeta.coordinate_network.default, type_promotion_kind=None)(lower)


def _blocks(count: int) -> Iterator[range]:
    return (range(a, min(a + _TOGETHER, count)) for a in range(0, count, _TOGETHER))
