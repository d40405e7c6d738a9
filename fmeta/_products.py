"""Matrix products whose results are read transposed, made transposed in the first place.

The backward pass of a linear layer, and that of its backward pass, make many results that only
their transpose is read of. A call of a matrix product takes its factors in either order of axes for
nothing, whereas a loop that reads or writes across the rows is not vectorised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["turn_products"]

_aten = torch.ops.aten
_PRODUCTS = (_aten.bmm.default, _aten.mm.default)


def turn_products(module: fx.GraphModule) -> None:
    """Replaces ``(a @ b)^T`` by ``b^T @ a^T`` in a recorded graph, through sums of such.

    Results are the same but for rounding.

    Args:
        module: its nodes have example values, ``meta["val"]``.
    """
    graph = module.graph
    # From the end: a sum comes before what is summed, which then is read transposed, too.
    for node in reversed(list(graph.nodes)):
        if not node.users or not all(map(_is_turned, node.users)):
            continue
        if node.target in _PRODUCTS:
            terms = reversed(node.args)
        elif _is_sum(node):
            terms = node.args
        else:
            continue
        with graph.inserting_before(node):
            turned = graph.call_function(node.target, tuple(_turned(x, graph) for x in terms))
            turned.meta["val"] = node.meta["val"].mT
        for user in list(node.users):
            user.replace_all_uses_with(turned)
            graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()


def _is_turned(node: fx.Node) -> bool:
    """Whether this is the transpose of its argument's last two axes."""
    if node.target is _aten.t.default:
        return True
    if node.target is not _aten.transpose.int:
        return False
    rank = node.meta["val"].ndim
    return {axis % rank for axis in node.args[1:]} == {rank - 2, rank - 1}


def _is_sum(node: fx.Node) -> bool:
    if node.target is not _aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    values = [x.meta.get("val") if isinstance(x, fx.Node) else None for x in node.args]
    return all(
        isinstance(x, torch.Tensor) and x.shape == node.meta["val"].shape and x.ndim >= 2
        for x in values
    )


def _turned(x: Any, graph: fx.Graph) -> fx.Node:
    if _is_turned(x):
        return x.args[0]
    rank = x.meta["val"].ndim
    node = graph.call_function(_aten.transpose.int, (x, rank - 2, rank - 1))
    node.meta["val"] = x.meta["val"].mT
    return node
