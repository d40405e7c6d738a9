"""Update rules as a few compiled kernels: what the rules share.

A rule's function of one tensor is cut where a number is needed that only a whole pass over the
tensor gives (a mean, a root mean square). Between two cuts everything (moments, features, the small
network) is elementwise, and Inductor makes one loop of it: features never leave the registers. The
network is written out unit by unit, since a matrix product would need its inputs in memory. The
same source gives C++ on a CPU and Triton on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fmeta._inductor import recorded_options, written_out_options
from fmeta._trace import recording

__all__ = [
    "FUSED_NUMEL",
    "in_memory",
    "layer",
    "recorded",
]

# Smaller tensors are stacked and updated together, which no compiled loop would make faster.
FUSED_NUMEL = 2**13


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
