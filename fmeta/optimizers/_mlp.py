"""The first learned rule of google/learned_optimization: momenta into a small network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._adafactor_mlp import check_sizes
from fmeta.optimizers._common import count, one_minus
from fmeta.optimizers._coordinate_net import (
    EPS,
    TILE,
    TIMES,
    Features,
    draw_layers,
    layers_of,
    run_layers,
    tiled_steps,
    time_bias,
)
from fmeta.optimizers._features import Tile, is_unobserved, sum_of_squares

__all__ = ["mlp"]

Tree = Any

_DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
_WEIGHTS = tuple(one_minus(d) for d in _DECAYS)
_MOMENTS = tuple(f"m{i}" for i in range(len(_DECAYS)))
_OWN = 2 + len(_DECAYS)


def mlp(
    hidden_size: int = 32,
    hidden_layers: int = 2,
    exp_mult: float = 0.001,
    step_mult: float = 0.001,
    *,
    chunk_size: int | None = None,
) -> Optimizer:
    """MLPLOpt, a small network of momenta: ``p -= step_mult d exp(exp_mult e)``.

    The network 19-32-32-2 (ReLU) sees each coordinate and gives direction d and magnitude e. Its
    features are the gradient, the parameter and six momenta (decays .1, .5, .9, .99, .999, .9999,
    not corrected for their start at zero), each divided by its root mean square over the tensor,
    and 11 features ``tanh(t / s - 1)`` of the number t of steps done, for s from 1 to 100,000.

    Where no derivative is recorded, a tensor is worked on in tiles that stay in cache.

    Args:
        hidden_size, hidden_layers: units of a hidden layer, and how many of these there are.
        exp_mult, step_mult: as above.
        chunk_size: coordinates a tile, where no derivative is recorded. Default: a size that suits
            the caches on a CPU, the whole tensor elsewhere.

    Returns:
        An `Optimizer` with ``opt_params``: weights ``w0: (19, 32)``, ``b0: (32)``, ``w1``, ... (as
        ``x @ w + b``), which may have other hidden sizes than the arguments say. Hidden at each
        leaf: ``m0``, ..., ``m5`` ``(*leaf)``, ``count``.

    Raises:
        ValueError: sizes below 1, numbers that are negative or not finite.

    Example:
        >>> rule = mlp(hidden_size=8)
        >>> {name: tuple(x.shape) for name, x in rule.init().items() if "w" in name}
        {'w0': (19, 8), 'w1': (8, 8), 'w2': (8, 2)}

    Reference:
        Metz et al., "Understanding and correcting pathologies in the training of learned
        optimizers", 1810.10180, appendix; with the features of 2203.11860, section 3.
    """
    check_sizes(hidden_size, hidden_layers, exp_mult, step_mult, chunk_size)

    def init(generator: torch.Generator | None = None) -> Tree:
        return draw_layers([_OWN + len(TIMES), *[hidden_size] * hidden_layers, 2], generator)

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {**{name: torch.zeros_like(p) for name in _MOMENTS}, "count": count(p)}

    def update(
        th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], batch: int = 0, own: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        done = {"count": h["count"] + 1}
        if p.numel() == 0:
            return torch.zeros_like(p), {**h, **done}
        size = chunk_size or (TILE if p.device.type == "cpu" else p.numel())
        columns, bias = th["w0"].narrow(0, 0, _OWN).mT, time_bias(th, h["count"], p, batch)
        layers, leaf_axes = layers_of(th, exp_mult), tuple(range(batch, p.ndim))
        planes = [h[name] for name in _MOMENTS]
        if (batch or p.numel() > size) and is_unobserved(p, g, *planes, *th.values()):
            new = planes if own else [p.new_empty(p.shape) for _ in _MOMENTS]

            def advance(tile: Tile, x: Tensor) -> None:
                for old, to, weight in zip(planes, new, _WEIGHTS, strict=True):
                    torch.lerp(tile.of(old), tile.of(g), weight, out=tile.of(to))

            def make(tile: Tile, x: Tensor) -> Tensor:
                for slot, y in zip(x.unbind(0), (g, p, *new), strict=True):
                    slot.copy_(tile.of(y))
                return x

            features = Features(_OWN, advance, make, lambda tile: (tile.of_broadcast(bias), None))
            delta = tiled_steps(features, columns, layers, p, leaf_axes, size, -step_mult)
            return delta, {**dict(zip(_MOMENTS, new, strict=True)), **done}
        new = [torch.lerp(old, g, weight) for old, weight in zip(planes, _WEIGHTS, strict=True)]
        x = torch.stack([g, p, *new])
        squares = sum_of_squares(x, tuple(i + 1 for i in leaf_axes))
        scale = torch.rsqrt(squares * (squares.numel() / x.numel()) + EPS)
        step = run_layers(columns, bias, x, scale, layers, p)
        return -step_mult * step, {**dict(zip(_MOMENTS, new, strict=True)), **done}

    return lift(init, init_hidden, update, batched=True, owning=True)
