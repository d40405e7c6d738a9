"""A pure function recorded once as a flat list of operations, then replayed.

A step under `vmap` spends a good part of its time on the transforms, on trees and on checks. What
is left of it after recording are torch's own operations, in the same order and with the same
results, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fmeta import trees

__all__ = ["Traced"]


class Traced:
    """``fn`` with its operations recorded at the first call for each structure and shapes.

    Only for functions of tensors that are pure: what they read from elsewhere is read once. No
    derivative is taken of the replayed operations.

    Args:
        fn: ``fn(*trees) -> tree``; leaves are tensors.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.recorded: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        flat, spec = trees.flatten(args)
        key = (spec, tuple((x.shape, x.dtype, x.device) for x in flat))
        with torch.no_grad():
            if key not in self.recorded:
                self.recorded[key] = self._record(flat, spec)
            replay, out_spec = self.recorded[key]
            if replay is None:
                return self.fn(*args)
            return trees.unflatten(out_spec, replay(*flat))

    def _record(self, flat: list[Tensor], spec: Any) -> tuple[Any, Any]:
        out: list[Any] = []

        def flat_fn(*flat: Tensor) -> list[Tensor]:
            leaves, out_spec = trees.flatten(self.fn(*trees.unflatten(spec, flat)))
            out[:] = [out_spec]
            return leaves

        try:
            module = make_fx(flat_fn)(*flat)
        except Exception:  # not recordable, or wrong: the function itself says what is wrong
            return None, None
        module.graph.eliminate_dead_code()
        module.recompile()
        return module, out[0]
