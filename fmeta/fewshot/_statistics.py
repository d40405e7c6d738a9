"""Modules whose batch normalisation takes its statistics as an argument, and gives them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fmeta.functional import functionalize

__all__ = ["explicit"]

Stats = tuple[tuple[Tensor, Tensor], ...]
Apply = Callable[[Any, Any, Tensor, Any], tuple[Tensor, Stats]]


class _Pass:
    """One call of a module: the statistics it is given, in the order of use, and those used."""

    def __init__(self, given: Stats) -> None:
        self.given: Iterator[tuple[Tensor, Tensor]] | None = iter(given) if given else None
        self.seen: list[tuple[Tensor, Tensor]] = []


_now: ContextVar[_Pass | None] = ContextVar("_now", default=None)


class _Normalise(nn.Module):
    """A batch normalisation by the statistics of the present `_Pass`, or else of its input."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        now = _now.get()
        if now is None or now.given is None:
            others = [d for d in range(x.ndim) if d != 1]
            var, mean = torch.var_mean(x, others, correction=0)
        else:
            mean, var = next(now.given)
        if now is not None:
            now.seen.append((mean, var))
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        places = (-1, *(1 for _ in range(x.ndim - 2)))
        return x * scale.view(places) + shift.view(places)


def explicit(module: nn.Module) -> tuple[Apply, dict[str, Tensor], dict[str, Tensor]]:
    """A module as a pure function of its parameters and of what it normalises by.

    Args:
        module: with layers of batch normalisation; it is left alone.

    Returns:
        ``(apply, params, buffers)``, as of `fmeta.functionalize`, but for ``apply(params, buffers,
        x, stats) -> (outputs, stats)``: mean and variance of each normalisation, in the order in
        which they are used; with ``stats`` ``()`` those of ``x``. Running ones are left out.
    """
    pure, params, buffers = functionalize(_replaced(copy.deepcopy(module)), batch_norm="batch")

    def apply(params: Any, buffers: Any, x: Tensor, stats: Any) -> tuple[Tensor, Stats]:
        now = _Pass(stats)
        token = _now.set(now)
        try:
            outputs = pure(params, buffers, x)
        finally:
            _now.reset(token)
        return outputs, tuple(now.seen)

    return apply, params, buffers


def _replaced(module: nn.Module) -> nn.Module:
    """The module with its layers of batch normalisation exchanged, each once also if used twice."""
    made: dict[int, nn.Module] = {}

    def of(norm: _BatchNorm) -> nn.Module:
        return made.setdefault(id(norm), _Normalise(norm))

    if isinstance(module, _BatchNorm):
        return of(module)
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if any(child is norm for norm in norms):
                parent._modules[name] = of(child)  # type: ignore[arg-type]
    return module
