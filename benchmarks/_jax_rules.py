"""Three rules of fmeta and two of its meta-gradients in JAX, to be timed beside it.

Written for speed under `jit` on a CPU: all trainings by `vmap` of one `lax.scan` over the inner
steps, features first in memory, what is constant along an axis kept at size one, the features'
scales in the weights of the first layer, draws inside the compiled function. The rules are those of
`fmeta.optimizers.mlp`, `adafactor_mlp` and `normalized_mlp` with their default arguments; the
weights and their names are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

__all__ = ["RULES", "Rule", "adafactor_mlp", "mlp", "normalized_mlp"]

Array = Any
TIMES = np.array((1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000), np.float32)


class Rule(NamedTuple):
    """A rule of one tensor: ``start(p) -> state`` and ``step(weights, p, g, state)``."""

    start: Callable[[Array], Any]
    step: Callable[[Any, Array, Array, Any], tuple[Array, Any]]


def mlp(exp_mult: float = 0.001, step_mult: float = 0.001) -> Rule:
    weights = 1 - np.array((0.1, 0.5, 0.9, 0.99, 0.999, 0.9999), np.float32)

    def start(p: Array) -> Any:
        return {"m": jnp.zeros((6, *p.shape)), "count": jnp.zeros((), jnp.int32)}

    def step(th: Any, p: Array, g: Array, h: Any) -> tuple[Array, Any]:
        m = h["m"] + _along(weights, g) * (g - h["m"])
        x = jnp.concatenate([jnp.stack([g, p]), m])
        delta = _network(th, th["w0"][:8], _time(th, h["count"], p), x, exp_mult, step_mult)
        return p + delta, {"m": m, "count": h["count"] + 1}

    return Rule(start, step)


def adafactor_mlp(exp_mult: float = 0.001, step_mult: float = 0.001) -> Rule:
    decays = {
        "momentum_decays": (0.9, 0.99, 0.999),
        "rms_decays": (0.999,),
        "adafactor_decays": (0.9, 0.99, 0.999),
    }

    def start(p: Array) -> Any:
        state = {"m": jnp.zeros((3, *p.shape)), "rms": jnp.zeros((1, *p.shape))}
        second = {"v": jnp.zeros((3, *p.shape))} if p.ndim < 2 else _start_factored(p)
        return {**state, **second, "count": jnp.zeros((), jnp.int32)}

    def step(th: Any, p: Array, g: Array, h: Any) -> tuple[Array, Any]:
        keep = {}  # one minus the decays
        for name, ds in decays.items():
            before = np.log(1 - np.array(ds, np.float32)) / 10
            kept = 1 - jnp.exp(10 * (before + th[name]))
            keep[name] = 1 - (kept if name[0] == "m" else jnp.clip(kept, 0, 1))
        square, second = g * g, _along(keep["adafactor_decays"], g)
        m = h["m"] + _along(keep["momentum_decays"], g) * (g - h["m"])
        rms = h["rms"] + _along(keep["rms_decays"], g) * (square - h["rms"])
        root, w0 = lax.rsqrt(rms + 1e-6), th["w0"]
        rows = [jnp.stack([g, p]), m, rms, m * root, root]
        new = {"m": m, "rms": rms, "count": h["count"] + 1}
        bias = _time(th, h["count"], p)
        if p.ndim < 2:
            v = new["v"] = h["v"] + second * (square + 1e-30 - h["v"])
            rows += [lax.rsqrt(jnp.maximum(v + 1e-9, 1e-9)) * g, m * lax.rsqrt(v + 1e-6)]
            rows += [v, lax.rsqrt(v + 1e-8)]
            sides = [w0[13:16] + w0[16:19], w0[19:22] + w0[22:25]]
        else:
            new |= (factored := _factored(h, square, second))
            factor = _factors(factored, p)
            rows += [factor * g, m * factor]
            sides = []
            for name, at in (("row", 13), ("col", 16)):
                w = jnp.concatenate([w0[at : at + 3], w0[at + 6 : at + 9]])
                bias = bias + _side(w, factored[name], None, 1e-5)
        columns = jnp.concatenate([w0[:13], w0[25:28], *sides])
        delta = _network(th, columns, bias, jnp.concatenate(rows), exp_mult, step_mult)
        return p + delta, new

    return Rule(start, step)


def normalized_mlp(lr: float = 0.01) -> Rule:
    weights = np.array((1 - 0.9, 1 - 0.99, 1 - 0.999), np.float32)

    def start(p: Array) -> Any:
        if p.ndim < 2:
            zeros = jnp.zeros_like(p)
            return {"m": zeros, "v": zeros, "count": jnp.zeros((), jnp.int32)}
        state = {"m": jnp.zeros((3, *p.shape)), "rms": jnp.zeros_like(p)}
        return {**state, **_start_factored(p)}

    def step(th: Any, p: Array, g: Array, h: Any) -> tuple[Array, Any]:
        if p.ndim < 2:
            return _adamw(p, g, h, lr)
        g = jnp.clip(g, -1000.0, 1000.0)
        square = g * g
        m = h["m"] + _along(weights, g) * (g - h["m"])
        rms = h["rms"] + 0.05 * (square - h["rms"])
        factored = _factored(h, square, _along(weights, g))
        root, factor, w0 = lax.rsqrt(rms + 1e-8), _factors(factored, p), th["w0"]
        rows = [jnp.stack([g, jnp.clip(g, -0.1, 0.1), p]), m, rms[None], m * root, root[None]]
        x = jnp.concatenate([*rows, factor * g, (g * root)[None], m * factor])
        bias = th["b0"].reshape(8, *(1,) * p.ndim)
        for name, at in (("row", 15), ("col", 18)):
            w = jnp.concatenate([w0[at : at + 3], w0[at + 6 : at + 9]])
            bias = bias + _side(w, factored[name], (-2, -1), 1e-9)
        scale = lax.rsqrt(jnp.mean(x * x, (-2, -1), keepdims=True) + 1e-9)
        y = _first(jnp.concatenate([w0[:15], w0[27:]]), x, scale, bias)
        y = th["w1"].T @ jax.nn.relu(y) + th["b1"][:, None]
        d = (th["w2"][:, 0] @ jax.nn.relu(y) + th["b2"][0]).reshape(p.shape)
        d = d * lax.rsqrt(jnp.mean(d * d, (-2, -1), keepdims=True) + 1e-9)
        return p - lr * d, {"m": m, "rms": rms, **factored}

    return Rule(start, step)


RULES = {"mlp": mlp, "adafactor_mlp": adafactor_mlp, "normalized_mlp": normalized_mlp}


# -- parts -----------------------------------------------------------------------------------------


def _along(weights: Array, like: Array) -> Array:
    """One number for each decay, to be broadcast over a leaf."""
    return weights.reshape(-1, *(1,) * like.ndim)


def _axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """The two largest axes ``(d1, d0)``, d0 the largest; of equal ones the last."""
    order = sorted(range(len(shape)), key=lambda i: shape[i])
    return order[-2], order[-1]


def _start_factored(p: Array) -> Any:
    d1, d0 = _axes(p.shape)
    sizes = [[1 if i == d else n for i, n in enumerate(p.shape)] for d in (d0, d1)]
    return {name: jnp.zeros((3, *s)) for name, s in zip(("row", "col"), sizes, strict=True)}


def _factored(h: Any, square: Array, weight: Array) -> Any:
    """Second moments of rows and columns, ``(decays, *leaf)`` with size 1 on the axis they lack."""
    d1, d0 = _axes(square.shape)
    means = {"row": square.mean(d0, keepdims=True), "col": square.mean(d1, keepdims=True)}
    return {k: h[k] + weight * (x + 1e-30 - h[k]) for k, x in means.items()}


def _factors(state: Any, p: Array) -> Array:
    d1, _ = _axes(p.shape)
    row, col = state["row"], state["col"]
    share = row / (row.mean(d1 + 1, keepdims=True) + 1e-9)
    return lax.rsqrt(jnp.maximum(share, 1e-9)) * lax.rsqrt(jnp.maximum(col, 1e-9))


def _side(w: Array, x: Array, axes: tuple[int, ...] | None, eps: float) -> Array:
    """What the features of rows (or columns) give in the first layer, ``(units, *)``."""
    y = jnp.concatenate([x, lax.rsqrt(x + 1e-8)])
    axes = tuple(range(1, y.ndim)) if axes is None else axes
    y = y * lax.rsqrt(jnp.mean(y * y, axes, keepdims=True) + eps)
    return (w.T @ y.reshape(len(y), -1)).reshape(-1, *y.shape[1:])


def _time(th: Any, count: Array, like: Array) -> Array:
    seen = jnp.tanh(count.astype(jnp.float32) / TIMES - 1)
    bias = th["b0"] + seen @ th["w0"][-len(TIMES) :]
    return bias.reshape(-1, *(1,) * like.ndim)


def _first(w: Array, x: Array, scale: Array, bias: Array) -> Array:
    """The first layer of scaled features, ``(units, n)``."""
    if scale.size == len(scale):
        w = w * scale.reshape(-1, 1)
    else:
        x = x * scale
    y = (w.T @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])
    return (y + bias).reshape(len(y), -1)


def _network(
    th: Any, columns: Array, bias: Array, x: Array, exp_mult: float, step_mult: float
) -> Array:
    """``-step_mult d exp(exp_mult e)`` of ``mlp`` and ``adafactor_mlp``."""
    scale = lax.rsqrt(jnp.mean(x * x, tuple(range(1, x.ndim)), keepdims=True) + 1e-5)
    y = _first(columns, x, scale, bias)
    n = 1
    while f"w{n}" in th:
        y = th[f"w{n}"].T @ jax.nn.relu(y) + th[f"b{n}"][:, None]
        n += 1
    return (-step_mult * y[0] * jnp.exp(exp_mult * y[1])).reshape(x.shape[1:])


def _adamw(p: Array, g: Array, h: Any, lr: float) -> tuple[Array, Any]:
    count = h["count"] + 1
    m, v = h["m"] + 0.1 * (g - h["m"]), h["v"] + 0.05 * (g * g - h["v"])
    t = count.astype(jnp.float32)
    first, second = (-jnp.expm1(t * math.log(b)) for b in (0.9, 0.95))
    v_hat = v / second
    positive = v_hat > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, v_hat, 1.0)), 0.0)
    return p - lr * (m / first) / (root + 1e-8), {"m": m, "v": v, "count": count}
