"""The features of `adafactor_mlp`, written once, for a whole tensor and for a tile of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._common import count, ema, one_minus
from fmeta.optimizers._coordinate_net import (
    EPS,
    TIMES,
    Features,
    layers_of,
    run_layers,
    tiled_steps,
    time_bias,
)
from fmeta.optimizers._features import (
    Tile,
    clamped_rsqrt,
    factored_axes,
    factors,
    normalize,
    start_factored,
    sum_of_squares,
    tiled_means,
)
from fmeta.optimizers._layout import Layout, small_matrices_first

__all__ = [
    "Decays",
    "first_columns",
    "leaf_factors",
    "learned_decays",
    "moment_names",
    "second_moments",
    "start",
    "steps",
    "tiled",
    "width",
]

Tree = Any


class Decays(NamedTuple):
    """Of the momenta, the second moments and the factored second moments: numbers or tensors."""

    momentum: tuple[Any, ...]
    rms: tuple[Any, ...]
    adafactor: tuple[Any, ...]

    @property
    def own(self) -> int:
        """Features before those of rows and columns: g, p, m, v, m v^-1/2, v^-1/2, factored g."""
        return 2 + 2 * len(self.momentum) + 2 * len(self.rms) + len(self.adafactor)


def width(decays: Decays) -> int:
    """Number of features, those of time included."""
    return decays.own + 5 * len(decays.adafactor) + len(TIMES)


def moment_names(decays: Decays) -> list[str]:
    """Keys of the hidden state that have the leaf's shape."""
    momenta = [f"m{i}" for i in range(len(decays.momentum))]
    return momenta + [f"rms{i}" for i in range(len(decays.rms))]


def start(p: Tensor, decays: Decays) -> dict[str, Tensor]:
    """The first hidden state of a leaf, planes in the order of axes that is worked in."""
    layout = small_matrices_first(tuple(p.shape)) if p.ndim > 1 else None
    like = p.shape if layout is None else layout.into(p).shape
    state = {name: p.new_zeros(like) for name in moment_names(decays)}
    if layout is not None:
        state = {name: layout.back(x) for name, x in state.items()}
    n = len(decays.adafactor)
    if p.ndim < 2:
        return {**state, "v": p.new_zeros(*p.shape, n), "count": count(p)}
    row, col = start_factored(p, n)
    return {**state, "row": row, "col": col, "count": count(p)}


def learned_decays(th: Tree, initial: Decays, dtype: torch.dtype) -> Decays:
    """What the weights make of the decays: ``1 - exp(10 (log(1 - d) / 10 + theta))``, scalars."""
    found = []
    for name, start in zip(Decays._fields, initial, strict=True):
        theta = th[f"{name}_decays"]
        theta = theta.to(dtype)
        # Filled, not made of a list: a transform does not allow that on each device.
        before = [theta.new_full((), math.log(one_minus(d)) / 10) for d in start]
        d = 1 - torch.exp(10 * (torch.stack(before) + theta))
        found.append((d if name == "momentum" else d.clamp(0, 1)).unbind(0))
    return Decays(*found)


def steps(
    th: Tree,
    p: Tensor,
    g: Tensor,
    h: Mapping[str, Tensor],
    initial: Decays,
    exp_mult: Any,
    batch: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``d exp(exp_mult e)`` for a whole tensor or a stack of them, and the new state."""
    decays = learned_decays(th, initial, p.dtype)
    square, new = g * g, {}
    for name, d in zip(moment_names(decays), (*decays.momentum, *decays.rms), strict=True):
        new[name] = ema(h[name], square if name.startswith("rms") else g, d)
    axes = _axes(p, batch)
    means = None if axes is None else (square.mean(axes[1]), square.mean(axes[0]))
    second = second_moments(h, square, means, decays)
    small = leaf_factors(th, second, decays, axes, range(batch, p.ndim))
    x = _features(p, g, new, small, decays)
    after = tuple(i + 1 for i in range(batch, p.ndim))
    squares = sum_of_squares(x, after)
    scale = torch.rsqrt(squares * (squares.numel() / x.numel()) + EPS)
    bias = time_bias(th, h["count"], p, batch)
    if small.row_bias is not None:
        bias = bias + small.row_bias + small.col_bias
    columns = first_columns(th, decays, axes)
    step = run_layers(columns, bias, x, scale, layers_of(th, exp_mult), p)
    return step, {**new, **second, "count": h["count"] + 1}


def tiled(
    th: Tree,
    p: Tensor,
    g: Tensor,
    h: Mapping[str, Tensor],
    initial: Decays,
    exp_mult: Any,
    factor: float,
    size: int,
    batch: int,
    own: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``factor d exp(exp_mult e)``, tile by tile; only without derivatives.

    Args:
        own: whether the state's memory may be used for the new one.
    """
    decays = learned_decays(th, initial, p.dtype)
    names = moment_names(decays)
    axes = _axes(p, batch)
    means, square = None, None
    if axes is None:
        square = g * g
    else:
        means = tiled_means(lambda part, out: torch.mul(part, part, out=out), g, axes, size)
    second = second_moments(h, square, means, decays)
    bias = time_bias(th, h["count"], p, batch)
    layout = small_matrices_first(tuple(p.shape), batch) if axes is not None else None
    planes = {name: h[name] for name in names}
    seen, leaf_axes, axes_in = dict(second), tuple(range(batch, p.ndim)), axes
    if layout is not None:
        assert axes is not None
        planes = {name: layout.into(x) for name, x in planes.items()}
        seen = {
            "row": layout.into_without(second["row"], axes[1]),
            "col": layout.into_without(second["col"], axes[0]),
        }
        leaf_axes, axes_in = _moved(layout, leaf_axes), _moved(layout, axes)  # type: ignore[assignment]
        p, g, bias = layout.into(p), layout.into(g), _into_after_units(layout, bias)
    new = {name: x if own else p.new_empty(p.shape) for name, x in planes.items()}
    small = leaf_factors(th, seen, decays, axes_in, leaf_axes)
    columns = first_columns(th, decays, axes)
    every = [*decays.momentum, *decays.rms]

    def advance(tile: Tile, x: Tensor) -> None:
        part, square = tile.of(g), x[0]
        torch.mul(part, part, out=square)
        for name, d in zip(names, every, strict=True):
            value = square if name.startswith("rms") else part
            ema(tile.of(planes[name]), value, d, tile.of(new[name]))

    def make(tile: Tile, x: Tensor) -> Tensor:
        values = {name: tile.of(y) for name, y in new.items()}
        return _features(tile.of(p), tile.of(g), values, small.of(tile), decays, x)

    time = bias

    def bias_of(tile: Tile) -> tuple[Tensor, Tensor | None]:
        if small.row_bias is None:
            return tile.of_broadcast(time), None
        of_row, of_col = tile.of_broadcast(small.row_bias), tile.of_broadcast(small.col_bias)
        return of_row + tile.of_broadcast(time), of_col

    features = Features(columns.shape[1], advance, make, bias_of)
    delta = tiled_steps(features, columns, layers_of(th, exp_mult), p, leaf_axes, size, factor)
    if layout is not None:
        delta = layout.back(delta)
        new = {name: layout.back(x) for name, x in new.items()}
    return delta, {**new, **second, "count": h["count"] + 1}


# -- formulas ----------------------------------------------------------------------------------


class _Small(NamedTuple):
    """What is known of rows and columns alone: size 1 on the axis it lacks.

    Attributes:
        row_factor, col_factor: ``(decays, *)``; for a tensor that is not factored the second
            moments ``(decays, *leaf)`` and None.
        row_bias, col_bias: parts of the first layer, ``(units, *)``, or None.
    """

    row_factor: Tensor
    col_factor: Tensor | None
    row_bias: Any
    col_bias: Any

    def of(self, tile: Tile) -> _Small:
        parts: list[Any] = [None if x is None else tile.of_broadcast(x) for x in self]
        return _Small(*parts)


def _axes(p: Tensor, batch: int) -> tuple[int, int] | None:
    if p.ndim - batch < 2:
        return None
    d1, d0 = factored_axes(p.shape[batch:])
    return d1 + batch, d0 + batch


def _moved(layout: Layout, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(layout.order.index(i) for i in axes)


def _into_after_units(layout: Layout, x: Tensor) -> Tensor:
    """``(units, *)`` in the working order."""
    return x.permute(0, *(i + 1 for i in layout.order))


def second_moments(
    h: Mapping[str, Tensor],
    square: Tensor | None,
    means: tuple[Tensor, Tensor] | None,
    decays: Decays,
) -> dict[str, Tensor]:
    """Second moments, factored where there are ``means`` over d0 and d1."""
    if means is None:
        assert square is not None
        return {"v": _stacked(h["v"], square + 1e-30, decays.adafactor)}
    return {
        name: _stacked(h[name], mean + 1e-30, decays.adafactor)
        for name, mean in zip(("row", "col"), means, strict=True)
    }


def _stacked(old: Tensor, x: Tensor, decays: Sequence[Any]) -> Tensor:
    return torch.stack([ema(o, x, d) for o, d in zip(old.unbind(-1), decays, strict=True)], -1)


def _features(
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor],
    small: _Small,
    decays: Decays,
    out: Tensor | None = None,
) -> Tensor:
    """The features that differ from coordinate to coordinate, feature first; see `first_columns`.

    Args:
        state: ``m0``, ..., ``rms0``, ... after this gradient.
        out: memory for them.
    """
    n, k, a = (len(d) for d in decays)
    m = [state[f"m{i}"] for i in range(n)]
    v = [state[f"rms{i}"] for i in range(k)]
    if out is None:
        momenta, seconds = torch.stack(m), torch.stack(v)
        root = torch.rsqrt(seconds + 1e-6)
        rows = [torch.stack([g, p]), momenta, seconds, momenta * root, root]
        if small.col_factor is not None:
            factor = small.row_factor * small.col_factor
            return torch.cat([*rows, factor * g, momenta * factor])
        w = small.row_factor
        rows += [clamped_rsqrt(w + 1e-9) * g, momenta * torch.rsqrt(w + 1e-6)]
        return torch.cat([*rows, w, torch.rsqrt(w + 1e-8)])
    at = 2 + n + k
    momenta, seconds = out[2 : 2 + n], out[2 + n : at]
    m_root, root = out[at : at + n], out[at + n : at + n + k]
    g_factor, m_factor = out[at + n + k : at + n + k + a], out[at + n + k + a : at + n + k + 2 * a]
    out[0].copy_(g)
    out[1].copy_(p)
    for slot, x in zip(out[2:at].unbind(0), [*m, *v], strict=True):
        slot.copy_(x)
    torch.rsqrt(torch.add(seconds, 1e-6, out=root), out=root)
    torch.mul(momenta, root, out=m_root)
    if small.col_factor is not None:
        torch.mul(small.row_factor, small.col_factor, out=m_factor)
        torch.mul(m_factor, out[0], out=g_factor)
        m_factor.mul_(momenta)
        return out
    w, w_root = out[-2 * a : -a], out[-a:]
    w.copy_(small.row_factor)
    torch.mul(clamped_rsqrt(torch.add(w, 1e-9, out=w_root)), out[0], out=g_factor)
    torch.rsqrt(torch.add(w, 1e-6, out=m_factor), out=m_factor).mul_(momenta)
    torch.rsqrt(torch.add(w, 1e-8, out=w_root), out=w_root)
    return out


def first_columns(th: Tree, decays: Decays, axes: Any) -> Tensor:
    """The first layer's weights of `_features`, ``(units, features)``.

    The features of rows and columns are constant along an axis and go through the layer in
    `leaf_factors`; for a tensor that is not factored both are its second moments.
    """
    w0, a, at = th["w0"], len(decays.adafactor), decays.own
    rows = [w0.narrow(0, 0, at), w0.narrow(0, at + 4 * a, a)]
    if axes is None:
        rows += [w0.narrow(0, at + i, a) + w0.narrow(0, at + i + a, a) for i in (0, 2 * a)]
    return torch.cat(rows).mT


def leaf_factors(
    th: Tree,
    second: Mapping[str, Tensor],
    decays: Decays,
    axes: tuple[int, int] | None,
    leaf_axes: Sequence[int],
) -> _Small:
    if axes is None:
        return _Small(second["v"].movedim(-1, 0), None, None, None)
    w0, a, at = th["w0"], len(decays.adafactor), decays.own
    factor, bias = [], []
    both = second["row"], second["col"]
    after = tuple(i + 1 for i in leaf_axes)
    for x, its_factor, axis, i in zip(
        both, factors(*both, axes), axes[::-1], (at, at + a), strict=True
    ):
        factor.append(
            its_factor.movedim(-1, 0)
            .clone(memory_format=torch.contiguous_format)
            .unsqueeze(axis + 1)
        )
        y = x.movedim(-1, 0).unsqueeze(axis + 1)
        y = normalize(torch.cat([y, torch.rsqrt(y + 1e-8)]), after, EPS)
        w = torch.cat([w0.narrow(0, i, a), w0.narrow(0, i + 2 * a, a)])
        bias.append((w.mT @ y.flatten(1)).reshape(-1, *y.shape[1:]))
    return _Small(factor[0], factor[1], bias[0], bias[1])
