"""Hand-made optimizers to compare with, and the learning rates that they are tuned over."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import optimizers
from fmeta.combinators import scheduled
from fmeta.optimizer import Optimizer

__all__ = ["BASELINES", "Baseline", "cosine", "get_baselines"]


class Baseline(NamedTuple):
    """A hand-made optimizer and its grid.

    Attributes:
        label: what tables and figures call it.
        build: ``build(lr) -> Optimizer`` with nothing to learn.
        rates: learning rates to tune over, at least two, increasing.
    """

    label: str
    build: Callable[[Any], Optimizer]
    rates: tuple[float, ...]


def cosine(optimizer: Optimizer) -> Optimizer:
    """The optimizer with steps that fall from full length to 0 along half a cosine.

    Reference:
        Loshchilov and Hutter, "SGDR", 1608.03983, equation 5 (without restarts).
    """

    def factor(t: Tensor, num_steps: Tensor | None) -> Tensor:
        assert num_steps is not None  # `needs` asks for it
        return 0.5 * (1 + torch.cos(math.pi * t / num_steps))

    return scheduled(optimizer, factor, needs={"num_steps"})


def _half_decades(low: int, high: int) -> tuple[float, ...]:
    return tuple(10 ** (e / 2) for e in range(2 * low, 2 * high + 1))


_SINGLE = {
    "adam": Baseline("Adam", optimizers.adam, _half_decades(-4, -1)),
    "adamw": Baseline("AdamW", optimizers.adamw, _half_decades(-4, -1)),
    "sgd": Baseline(
        "SGD momentum", lambda lr: optimizers.sgd(lr, momentum=0.9), _half_decades(-3, 0)
    ),
    # The families of fmeta.tasks hold their matrices as x @ w.
    "muon": Baseline(
        "Muon + AdamW", lambda lr: optimizers.muon(lr, layout="in_out"), _half_decades(-3, 0)
    ),
}


def _with_cosine(base: Baseline) -> Baseline:
    return Baseline(f"{base.label}, cosine", lambda lr: cosine(base.build(lr)), base.rates)


BASELINES: dict[str, Baseline] = {
    name: baseline
    for key, base in _SINGLE.items()
    for name, baseline in ((key, base), (f"{key}_cosine", _with_cosine(base)))
}


def get_baselines(names: Iterable[str]) -> dict[str, Baseline]:
    """The baselines of these names.

    Args:
        names: keys of ``BASELINES``: ``"adam"``, ``"adam_cosine"``, ...

    Raises:
        ValueError: for an unknown name, with those that are near and all that there are.
    """
    found = {}
    for name in names:
        if name not in BASELINES:
            near = difflib.get_close_matches(name, BASELINES, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"unknown baseline {name!r}: {hint}there are {', '.join(BASELINES)}")
        found[name] = BASELINES[name]
    return found
