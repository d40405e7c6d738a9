"""The learned rule of google/learned_optimization with Adafactor's features ("small_fc")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta._lift import lift
from fmeta.optimizer import Optimizer
from fmeta.optimizers._adafactor_mlp_fused import fused, is_fused
from fmeta.optimizers._adafactor_mlp_net import Decays, Net, net_of, planes, start, steps, width
from fmeta.optimizers._adafactor_mlp_tiles import tiled
from fmeta.optimizers._adafactor_mlp_written import is_written_out, written_out
from fmeta.optimizers._common import check_number
from fmeta.optimizers._coordinate_net import draw_layers
from fmeta.optimizers._features import is_unobserved
from fmeta.optimizers._tiled_network import tile_size

__all__ = ["adafactor_mlp", "check_sizes"]

Tree = Any


def adafactor_mlp(
    hidden_size: int = 4,
    hidden_layers: int = 2,
    exp_mult: float = 0.001,
    step_mult: float = 0.001,
    initial_momentum_decays: Sequence[float] = (0.9, 0.99, 0.999),
    initial_rms_decays: Sequence[float] = (0.999,),
    initial_adafactor_decays: Sequence[float] = (0.9, 0.99, 0.999),
    *,
    chunk_size: int | None = None,
    compile: bool = False,
) -> Optimizer:
    """Small network of Adafactor's features: ``p -= step_mult d exp(exp_mult e)``.

    The network 39-4-4-2 (ReLU) sees each coordinate and gives direction d and magnitude e. Its
    features are made of the gradient g, the parameter p, three momenta m (decays .9, .99, .999),
    the second moment v (.999) and factored ones r, c over rows and columns (.9, .99, .999), with
    Adafactor's factors f_r, f_c of them: ``g; p; m; v; m v^-1/2; v^-1/2; g f_r f_c; r; c; r^-1/2;
    c^-1/2; m f_r f_c``, each divided by its root mean square over the tensor; and 11 features
    ``tanh(t / s - 1)`` of the number t of steps done, for s from 1 to 100,000. A tensor with fewer
    than two axes has its second moments, not factored, for r and c. Nothing is corrected for its
    start at zero. All decays are learned too, as ``1 - exp(10 (log(1 - d) / 10 + theta))``.

    Where no derivative is recorded, a tensor is worked on in tiles that stay in cache.

    Args:
        hidden_size, hidden_layers: units of a hidden layer, and how many of these there are.
        exp_mult, step_mult: as above.
        initial_momentum_decays: of the momenta.
        initial_rms_decays: of the second moment; one, or as many as momenta.
        initial_adafactor_decays: of the factored second moments; as many as momenta.
        chunk_size: coordinates a tile, where no derivative is recorded. Default: a size that suits
            the caches on a CPU, the whole tensor elsewhere.
        compile: whether large tensors go through a few kernels made by `torch.compile` (C++ or
            Triton), where no derivative is recorded and the network is no larger than one layer of
            32 units; takes a minute, two with 32 units, once, and is kept on disk by torch.

    Returns:
        An `Optimizer` with ``opt_params``: weights ``w0: (39, 4)``, ``b0: (4)``, ``w1``, ... (as
        ``x @ w + b``), and ``momentum_decays``, ``rms_decays``, ``adafactor_decays``: theta above,
        zeros at first. The weights may have other hidden sizes than the arguments say. Hidden at
        each leaf: ``m0, m1, ...`` and ``rms0, ...`` ``(*leaf)``; ``row``, ``col`` ``(*leaf without
        its largest, second largest axis, decays)``, or ``v`` ``(*leaf, decays)`` for fewer than two
        axes; ``count``.

    Raises:
        ValueError: sizes below 1, decays out of [0, 1), numbers of decays that do not fit.

    Example:
        >>> rule = adafactor_mlp()
        >>> {name: tuple(x.shape) for name, x in rule.init().items() if "w" in name}
        {'w0': (39, 4), 'w1': (4, 4), 'w2': (4, 2)}

    Reference:
        Metz et al., "Practical tradeoffs between memory, compute, and performance in learned
        optimizers", 2203.11860, section 3 ("small_fc").
    """
    check_sizes(hidden_size, hidden_layers, exp_mult, step_mult, chunk_size)
    initial = Decays(
        tuple(initial_momentum_decays), tuple(initial_rms_decays), tuple(initial_adafactor_decays)
    )
    _check_decays(initial)

    def init(generator: torch.Generator | None = None) -> Tree:
        th = draw_layers([width(initial), *[hidden_size] * hidden_layers, 2], generator)
        names = ("momentum_decays", "rms_decays", "adafactor_decays")
        return th | {name: torch.zeros(len(d)) for name, d in zip(names, initial, strict=True)}

    def init_hidden(th: Tree, p: Tensor) -> dict[str, Tensor]:
        return start(p, initial)

    def prepare(th: Tree) -> Net:
        return net_of(th, initial, step_mult, exp_mult)

    def update(
        net: Net, p: Tensor, g: Tensor, h: dict[str, Tensor], batch: int = 0, own: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if p.numel() == 0:
            return torch.zeros_like(p), {**h, "count": h["count"] + 1}
        if is_written_out(net, p, batch):
            return written_out(net, p, g, h)
        if not is_unobserved(p, g, *(h[name] for name in planes(net)), *net.tensors()):
            return steps(net, p, g, h, batch)
        if compile and is_fused(net, p, batch):
            return fused(net, p, g, h, batch, own)
        size = chunk_size or tile_size(net.columns, p)
        return tiled(net, p, g, h, batch, size, own)

    return lift(
        init,
        init_hidden,
        update,
        prepare=prepare,
        batched=True,
        large_stacks=True,
        owning=True,
    )


def check_sizes(
    hidden_size: int, hidden_layers: int, exp_mult: float, step_mult: float, chunk_size: int | None
) -> None:
    """Raises a ValueError for sizes that make no network."""
    sizes = {"hidden_size": hidden_size, "hidden_layers": hidden_layers, "chunk_size": chunk_size}
    for name, n in sizes.items():
        if n is None:
            continue
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")
    check_number("exp_mult", exp_mult)
    check_number("step_mult", step_mult)


def _check_decays(initial: Decays) -> None:
    for name, decays in zip(Decays._fields, initial, strict=True):
        for d in decays:
            if not 0 <= d < 1:
                raise ValueError(f"initial_{name}_decays must be in [0, 1), got {d!r}")
    n = len(initial.momentum)
    if not n or len(initial.adafactor) != n or len(initial.rms) not in (1, n):
        raise ValueError(
            "there must be as many initial_adafactor_decays as initial_momentum_decays (at least "
            f"one), and one of initial_rms_decays or as many; got {len(initial.adafactor)}, {n}, "
            f"{len(initial.rms)}"
        )
