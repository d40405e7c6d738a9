"""The features of `velo` that each coordinate has, and what of the first layer goes with them.

All of it is for a stack of B leaves with a network each; one leaf is a stack of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._common import ema
from fmeta.optimizers._features import Tile, clamped_rsqrt, factors, normalize, stacked_ema

__all__ = [
    "EPS",
    "INPUTS",
    "MOMENTS",
    "Decays",
    "Net",
    "Slots",
    "Small",
    "clamped",
    "columns_of",
    "factored",
    "factored_axes",
    "features_of",
    "moments",
    "second_moments",
]

INPUTS = 30
MOMENTS = ("m0", "m1", "m2", "rms")
EPS = 1e-5  # of the features' root mean squares

# m v^-1/2 has no eps: both are scaled by powers of two before v is clamped, so that it is exact
# down to v = 1e-21 and has finite derivatives in float32.
_M_UNIT, _V_UNIT = 2.0**20, 2.0**40
# Rows of w0 that have an input of their own at every coordinate; 15 to 26 are four groups of three
# (r, c, r^-1/2, c^-1/2), which are constant along an axis.
_OWN = (slice(0, 15), slice(27, 30))
_FACTORED = (15, 18)
# Rows of `Slots`.
_STARTS = (0, 1, 2, 3, 6, 7, 10, 11, 14, 15, 18, 21, 24)


class Decays(NamedTuple):
    """Of the momenta, the second moment and the factored second moments."""

    momentum: tuple[float, ...]
    rms: tuple[float, ...]
    adafactor: tuple[float, ...]


class Net(NamedTuple):
    """A network for each of B leaves: of layer i ``(B, in, out)`` and ``(B, out)``.

    There are 30 inputs; the outputs are direction, magnitude and one that is not used.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def factored_axes(shape: Sequence[int]) -> tuple[int, int]:
    """The two largest axes ``(d1, d0)``, of equal ones the last; d0 is the larger.

    If these two are equal it is the first of them, but in a tensor of four axes whose first two
    they are.
    """
    order = sorted(range(len(shape)), key=lambda i: shape[i])
    d1, d0 = order[-2:]
    if shape[d1] == shape[d0] and not (len(shape) == 4 and (d1, d0) == (0, 1)):
        return d0, d1
    return d1, d0


class Small(NamedTuple):
    """What depends on the factored second moments alone, with size 1 on the axis it lacks."""

    row_factor: Tensor  # (3, B, *)
    col_factor: Tensor
    row_bias: Tensor  # (units, B, *), parts of the first layer
    col_bias: Tensor

    def of(self, tile: Tile) -> Small:
        return Small(*(tile.of_broadcast(x) for x in self))


def clamped(g: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.clamp(g, -1000.0, 1000.0, out=out)


def moments(
    g: Tensor,
    square: Tensor,
    h: Mapping[str, Tensor],
    decays: Decays,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Momenta and second moment after the clamped gradient ``g`` and its square."""
    new = {}
    for name, decay in zip(MOMENTS, (*decays.momentum, *decays.rms), strict=True):
        x = square if name == "rms" else g
        new[name] = ema(h[name], x, decay, None if out is None else out[name])
    return new


def second_moments(
    h: Mapping[str, Tensor], row: Tensor, col: Tensor, decays: Decays
) -> dict[str, Tensor]:
    """Factored second moments after the means of the squared gradient over one axis each."""
    return {
        "row": stacked_ema(h["row"], row + 1e-30, decays.adafactor),
        "col": stacked_ema(h["col"], col + 1e-30, decays.adafactor),
    }


def features_of(
    p: Tensor, g: Tensor, state: Mapping[str, Tensor], small: Small | None, out: Any = None
) -> Tensor:
    """The features that differ from coordinate to coordinate, feature first.

    Args:
        p, g: ``(*shape)``, g clamped.
        state: ``m0``, ``m1``, ``m2``, ``rms`` after this gradient; ``v`` without ``small``.
        small: the factors, to be broadcast over the shape; None for vectors and scalars.
        out: memory, with ``g`` in its first row.

    Returns:
        ``(18, *shape)``, or ``(24, *shape)`` without ``small``; the order of `columns_of`.
    """
    to = out or Slots.none()
    rms = state["rms"]
    clipped = torch.clamp(g, -0.1, 0.1, out=to.clipped)
    m = torch.stack([state[name] for name in MOMENTS[:3]], out=to.m)
    root = torch.rsqrt(torch.add(rms, 1e-6, out=to.root), out=to.root)
    m_root = torch.mul(m, root, out=to.m_root)
    g_root = torch.mul(g, root, out=to.g_root)
    if small is not None:
        factor = torch.mul(small.row_factor, small.col_factor, out=to.m_factor)
        g_factor = torch.mul(factor, g, out=to.g_factor)
        m_factor = torch.mul(m, factor, out=to.m_factor)
    else:
        v = state["v"].movedim(-1, 0)
        g_factor = torch.mul(clamped_rsqrt(v + 1e-9), g, out=to.g_factor)
        m_factor = torch.mul(m * _M_UNIT, clamped_rsqrt(v * _V_UNIT), out=to.m_factor)
    if out is None:
        rows = [torch.stack([g, clipped, p]), m, rms.unsqueeze(0), m_root, root.unsqueeze(0)]
        rows += [g_factor, g_root.unsqueeze(0), m_factor]
        return torch.cat(rows if small is not None else [*rows, v, torch.rsqrt(v + 1e-8)])
    out.p.copy_(p)
    out.rms.copy_(rms)
    if small is None:
        out.v.copy_(v)
        torch.rsqrt(torch.add(v, 1e-8, out=out.v_root), out=out.v_root)
    return out.all


def factored(net: Net, state: Mapping[str, Tensor], axes: tuple[int, int]) -> Small:
    """The factors, and the first layer's part of what is constant along an axis.

    Those features are not laid out for every coordinate: they are multiplied by their weights here,
    once for a row or column.
    """
    w0, factor, bias = net.weights[0], [], []
    both = state["row"], state["col"]
    parts = zip(both, factors(*both, axes), axes[::-1], _FACTORED, strict=True)
    for second, its_factor, axis, i in parts:
        factor.append(_packed(its_factor.movedim(-1, 0)).unsqueeze(axis + 1))
        x = second.movedim(-1, 0).unsqueeze(axis + 1)
        x = torch.cat([x, torch.rsqrt(x + 1e-8)])
        x = normalize(x, tuple(range(2, x.ndim)), EPS)
        w = torch.cat([w0.narrow(1, i, 3), w0.narrow(1, i + 6, 3)], 1)
        y = w.mT @ x.flatten(2).transpose(0, 1)
        bias.append(y.transpose(0, 1).reshape(-1, *x.shape[1:]))
    b0 = net.biases[0].mT.reshape(*bias[0].shape[:2], *(1,) * (bias[0].ndim - 2))
    return Small(factor[0], factor[1], bias[0] + b0, bias[1])


def columns_of(net: Net, p: Tensor) -> Tensor:
    """The first layer's weights of `features_of`, ``(B, units, features)``."""
    w0 = net.weights[0]
    rows = [w0.narrow(1, s.start, s.stop - s.start) for s in _OWN]
    if p.ndim < 3:  # rows and columns are one and the same
        rows += [w0.narrow(1, i, 3) + w0.narrow(1, i + 3, 3) for i in (15, 21)]
    return torch.cat(rows, 1).mT


def _packed(x: Tensor) -> Tensor:
    """A contiguous copy (`.contiguous` itself asks for the library of the tensor's device)."""
    return x.clone(memory_format=torch.contiguous_format)


class Slots(NamedTuple):
    """Memory for `features_of`: its parts by name."""

    all: Any
    g: Any
    clipped: Any
    p: Any
    m: Any
    rms: Any
    m_root: Any
    root: Any
    g_factor: Any
    g_root: Any
    m_factor: Any
    v: Any
    v_root: Any

    @classmethod
    def none(cls) -> Slots:
        return cls(*(None,) * 13)

    @classmethod
    def of(cls, x: Tensor) -> Slots:
        g, clipped, p, m, rms, m_root, root, g_factor, g_root, m_factor, v, v_root = (
            x[a:b] if b - a > 1 else x[a] for a, b in itertools.pairwise(_STARTS)
        )
        return cls(x, g, clipped, p, m, rms, m_root, root, g_factor, g_root, m_factor, v, v_root)
