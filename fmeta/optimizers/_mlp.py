"""The first learned rule of google/learned_optimization: momenta into a small network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._adafactor_mlp import check_sizes
from fmeta.optimizers._common import count, one_minus
from fmeta.optimizers._coordinate_net import (
    TIMES,
    Layers,
    Time,
    draw_layers,
    layers_of,
    run_layers,
    time_bias,
    time_of,
)
from fmeta.optimizers._features import is_unobserved
from fmeta.optimizers._tiled_network import Features, tile_size, tiled_steps
from fmeta.optimizers._tiles import Cuts, Scratch

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

    def prepare(th: Tree) -> _Net:
        columns = th["w0"].narrow(0, 0, _OWN).mT
        return _Net(columns, time_of(th), layers_of(th, step_mult, exp_mult), Scratch())

    def update(
        net: _Net, p: Tensor, g: Tensor, h: dict[str, Tensor], batch: int = 0, own: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        done = {"count": h["count"] + 1}
        if p.numel() == 0:
            return torch.zeros_like(p), {**h, **done}
        bias, old = time_bias(net.time, h["count"], p, batch), [h[name] for name in _MOMENTS]
        if is_unobserved(p, g, bias, *old, *(x for pair in net.layers for x in pair)):
            size = chunk_size or tile_size(net.columns, p)
            delta, new = _tiled(net, bias, p, g, old, batch, size, own)
        else:
            new = [torch.lerp(m, g, weight) for m, weight in zip(old, _WEIGHTS, strict=True)]
            x = torch.stack([g, p, *new])
            delta = run_layers(net.columns, bias, x, net.layers, p, batch)
        return delta, {**dict(zip(_MOMENTS, new, strict=True)), **done}

    return lift(init, init_hidden, update, prepare=prepare, batched=True, owning=True)


class _Net(NamedTuple):
    """The first layer of features and of time, the layers after it, memory for tiles."""

    columns: Tensor
    time: Time
    layers: Layers
    scratch: Scratch


def _tiled(
    net: _Net,
    bias: Tensor,
    p: Tensor,
    g: Tensor,
    old: list[Tensor],
    batch: int,
    size: int,
    own: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Delta and momenta, tile by tile; only without derivatives."""
    cuts = Cuts(p.shape, size)
    new = old if own else [torch.empty_like(m) for m in old]
    of_p, of_g = cuts.of(p), cuts.of(g)
    of_old, of_new = (list(zip(*map(cuts.of, x), strict=True)) for x in (old, new))

    def fill(i: int, x: Tensor, again: bool) -> None:
        if not again:
            for before, after, weight in zip(of_old[i], of_new[i], _WEIGHTS, strict=True):
                torch.lerp(before, of_g[i], weight, out=after)
        torch.stack([of_g[i], of_p[i], *of_new[i]], out=x)

    features = Features(_OWN, fill, [bias])
    delta = tiled_steps(features, cuts, net.columns, net.layers, p, batch, net.scratch)
    return delta, new
