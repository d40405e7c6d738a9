"""A learned mixture of hand-made update directions, with a schedule of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._newton_schulz import orthogonalize
from fmeta._treewise import treewise
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import bias_corrections, check_number, count, ema
from fmeta.random import own

__all__ = ["basis_mlp"]

Tree = Any

_DECAYS = (0.9, 0.98)  # of the momenta; the second moment has the slower one
_BASES = 6  # directions: g / v^1/2, m / v^1/2, n / v^1/2, m / rms(m), orthogonal, p / rms(p)
_MOMENTUM, _ORTHOGONAL = 1, 4
_FEATURES = _BASES + 3  # of a coordinate: the directions, its size of gradient, |m / v^1/2|, 1
_TENSOR_FEATURES = 9
_HIDDEN = 12
_BOUND = 5.0  # of a direction, whose typical size is 1
# Float32 has room for the square of _HUGE, and for the derivative of the root of _TINY.
_HUGE, _TINY = 1e15, 1e-24
_STEP = 0.01  # size of the untrained rule's steps, for 200 steps and parameters of size 0.1

# What a tensor is told by its network: log-rate, a and b, gates, bias of the other network.
_TOLD = (1, 2, _BASES, _HIDDEN)

# Numbers that act strongly are stored in these units, so that one size of perturbation, and of
# step, suits all meta-parameters. Not those that act the more the longer a training is (exponent
# of T, gates of p): short trainings tell little of them, and must not carry them away.
_UNIT = 5.0


def basis_mlp(lr: Any = 1.0, ns_steps: int = 4) -> Optimizer:
    """Mixes six hand-made directions by learned gates, at a learned rate, to the end of a schedule.

    Take g, the gradient; m and n, its momenta (decays .9, .98); v, its second moment (.98); all
    corrected for their start at zero. Each tensor p then has six directions: ``g v^-1/2; m v^-1/2;
    n v^-1/2; m / rms(m); o; p / rms(p)``, bounded by +-5 (v raised by 1e-8 of its mean). Of a
    matrix, o is ``m + a n + b g`` with its singular values moved to about one by Newton-Schulz,
    as in Muon, and then to about unit rms (kernels are matrices ``(first, rest)``); of a vector it
    is ``m v^-1/2``, as in Adam. The update is the sum of the directions, each times its gate; it
    is divided by its rms over the tensor and multiplied by a step size.

    A network that sees each tensor (progress t/T, steps since the start, its kind and number of
    elements, growth of the parameters, signal-to-noise ``rms(m v^-1/2)``) gives the tensor's gates,
    a and b, a bounded factor of its rate, and the bias of a second network, which sees each
    coordinate (its six directions, ``|m v^-1/2|``, its share of v) and adds gates of its own. The
    step size is ``0.01 lr exp(log_lr) sqrt(s / 0.1) (T / 200)^-0.4 schedule(t / T)``, s the rms of
    the parameters at the start (between .02 and 1); the schedule rises over the first 5 % of the
    steps and falls linearly to 2 %, where it stays. Rates for matrices and vectors, the exponents
    and lengths in it are learned.

    Untrained the networks give nothing: the rule adds ``m v^-1/2`` and o (Adam and Muon, evenly),
    for vectors it is Adam with this step size. It knows neither the scale of the loss (with
    gradients well above 1e-8) nor, up to the root, that of the parameters. What the networks see of
    time is bounded, so longer trainings than those it has learned from hold nothing new for them.

    Args:
        lr: factor of all steps: a number or a scalar tensor.
        ns_steps: Newton-Schulz iterations.

    Returns:
        An `Optimizer` that needs ``num_steps``. ``opt_params``: ``log_lr`` (2,), ``schedule`` (4,)
        and ``gates`` (2, 6), all in units of 5 but for the last of ``schedule`` (the exponent of T)
        and of ``gates`` (of p), rows for matrices and vectors; ``w0`` (9, 12),
        ``w1`` (12, 6); ``tensor_w0`` (9, 12), ``tensor_b0`` (12,), ``tensor_w1`` (12, 21). Hidden
        at each leaf: ``m``, ``n``, ``v`` ``(*leaf)``; ``scale``, ``growth``, ``signal``, ``count``
        scalars; shared: ``t``, ``num_steps``.

    Raises:
        ValueError: ``lr`` negative or not finite, ``ns_steps`` below 1, no ``num_steps``.

    Example:
        >>> rule = basis_mlp()
        >>> params = {"w": torch.ones(2, 2)}
        >>> state = rule.init_hidden(rule.init(), params, num_steps=10)
        >>> new, state = rule.step(rule.init(), params, params, state)
        >>> bool((new["w"] < params["w"]).all())
        True

    Reference:
        After Celo2 (2602.19142) and VeLO (2211.09760), with Muon's direction (Jordan et al., 2024).
    """
    check_number("lr", lr)
    if not isinstance(ns_steps, int) or ns_steps < 1:
        raise ValueError(f"ns_steps must be an integer of at least 1, got {ns_steps!r}")
    return treewise(_Rule(lr, ns_steps))


class _Rule:
    needs = frozenset({"num_steps"})

    def __init__(self, lr: Any, ns_steps: int) -> None:
        self.lr, self.ns_steps = lr, ns_steps

    def init(self, generator: torch.Generator | None = None) -> Tree:
        generator = own(generator)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * math.sqrt(2 / shape[0])

        gates = torch.zeros(2, _BASES)
        gates[0, [_MOMENTUM, _ORTHOGONAL]] = 1.0
        gates[1, _MOMENTUM] = 1.0
        w0 = random(_FEATURES, _HIDDEN)
        w0[-1] = 0.0  # the bias
        return {
            "log_lr": torch.zeros(2),
            "schedule": torch.tensor([0.0, 0.0, 0.0, -0.4]),
            "gates": gates / _UNIT,
            "w0": w0,
            "w1": torch.zeros(_HIDDEN, _BASES),
            "tensor_w0": random(_TENSOR_FEATURES, _HIDDEN),
            "tensor_b0": torch.zeros(_HIDDEN),
            "tensor_w1": torch.zeros(_HIDDEN, sum(_TOLD)),
        }

    def init_hidden(self, th: Tree, p: Tensor) -> dict[str, Tensor]:
        scale = _rms(p).clamp(0.02, 1.0)
        zeros = {name: torch.zeros_like(scale) for name in ("signal", "growth")}
        scalars = {"scale": scale, "count": count(p), **zeros}
        return {**{name: torch.zeros_like(p) for name in "mnv"}, **scalars}

    def init_shared(self, th: Tree, params: Tree, *, num_steps: Any) -> dict[str, Tensor]:
        like = next((p for p in trees.leaves(params) if p is not None), torch.zeros(()))
        total = torch.as_tensor(num_steps, device=like.device).to(trees.compute_dtype(like))
        return {"t": torch.zeros_like(total), "num_steps": total}

    def summary(self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor]) -> Tensor:
        scale = h["scale"]
        fixed = (float(p.ndim >= 2), math.log(max(p.numel(), 1)) / 5 - 1)
        scalars = [h["count"].to(scale.dtype), h["signal"], h["growth"], scale]
        return torch.stack([*scalars, *(scale.new_full((), x) for x in fixed)])

    def mix(
        self,
        th: Tree,
        summaries: Tensor,
        tensors: Tree,
        shared: dict[str, Tensor],
        loss: Tensor | None = None,
        extras: Any = None,
    ) -> tuple[Tensor, Tree, dict[str, Tensor]]:
        steps, signal, growth, scale, is_matrix, numel = summaries.unbind(1)
        t, total = shared["t"].to(scale.dtype), shared["num_steps"].to(scale.dtype)
        done = (t / total).clamp(max=1)  # also after the horizon
        time = torch.stack(
            [done, done * done, *(torch.exp(x) for x in (-10 * done, -t / 10, -t / 50))]
        )
        seen = torch.stack([is_matrix, signal, growth, numel], 1)
        seen = torch.cat([time.expand(len(seen), 5), seen], 1)
        hidden = torch.relu(seen @ th["tensor_w0"] + th["tensor_b0"])
        rate, ab, gates, bias = (hidden @ th["tensor_w1"]).split(_TOLD, 1)
        kind = torch.stack([is_matrix, 1 - is_matrix], 1)
        log_rate = kind @ (_UNIT * th["log_lr"]) + 2 * torch.tanh(rate.squeeze(1) / 2)
        size = torch.exp(log_rate) * torch.sqrt(scale / 0.1) * self._schedule(th, t, done, total)
        strong, of_p = th["gates"].split((_BASES - 1, 1), 1)
        gates = gates + kind @ torch.cat([_UNIT * strong, of_p], 1)
        corrections = bias_corrections(_DECAYS, steps + 1, scale.dtype)
        controls = torch.cat([torch.stack([size, *corrections], 1), ab, gates, bias], 1)
        return controls, tensors, {"t": shared["t"] + 1, "num_steps": shared["num_steps"]}

    def _schedule(self, th: Tree, t: Tensor, done: Tensor, total: Tensor) -> Tensor:
        """Step size after ``t`` of ``total`` steps, the part ``done`` of the way."""
        shape, longer = th["schedule"].split((3, 1))
        warm, power, floor = (_UNIT * shape).unbind(0)
        rise = (t + 1) / (1 + 0.05 * torch.exp(warm.clamp(-3, 2)) * total)
        end = 0.02 * torch.exp(floor.clamp(-3, 2))
        left = 1 - done * (1 - end)
        # Powers with learned exponents, by their logarithms.
        fall = torch.exp(power.clamp(-2, 2)) * torch.log(left)
        return (
            _STEP * rise.clamp(max=1) * torch.exp(fall + longer.squeeze(0) * torch.log(total / 200))
        )

    def update(
        self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], control: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        size, c0, c1, a, b = control.narrow(0, 0, 5).unbind(0)
        gates, bias = control.narrow(0, 5, _BASES), control.narrow(0, 5 + _BASES, _HIDDEN)
        g = g.clamp(-_HUGE, _HUGE)
        m, n = ema(h["m"], g, _DECAYS[0]), ema(h["n"], g, _DECAYS[1])
        v = ema(h["v"], g * g, _DECAYS[1])
        new = {"m": m, "n": n, "v": v, "scale": h["scale"], "count": h["count"] + 1}
        if p.numel() == 0:
            return torch.zeros_like(p), {**new, "signal": h["signal"], "growth": h["growth"]}
        m, n, share = m / c0, n / c1, v / (v.mean() + _TINY)
        # Relative to the tensor's mean: gradients of any scale are told alike.
        root = torch.rsqrt(v / c1 + 1e-8 * (v.mean() / c1) + _TINY)
        momentum, size_of_p = m * root, _rms(p)
        o = self._orthogonal(m + a * n + b * g) if p.ndim >= 2 else momentum
        told = torch.stack(
            [
                g * root,
                momentum,
                n * root,
                m * torch.rsqrt(m.square().mean() + _TINY),
                o,
                p / (size_of_p + 1e-6),
                torch.log(share + 1e-6) / 3,
                momentum.abs(),
                torch.ones_like(p),
            ]
        )
        told = told.reshape(_FEATURES, -1).clamp(-_BOUND, _BOUND)
        weights, own_bias = th["w0"].split((_FEATURES - 1, 1))
        w0 = torch.cat([weights, own_bias + bias])
        own_gates = th["w1"].mT @ torch.relu(w0.mT @ told)
        x = ((own_gates + gates.unsqueeze(1)) * told.narrow(0, 0, _BASES)).sum(0)
        delta = x * (-self.lr * size * torch.rsqrt(x.square().mean() + 1e-12))
        new["signal"] = _rms(momentum)
        new["growth"] = torch.log(size_of_p.clamp_min(1e-3) / h["scale"]).clamp(-3, 3)
        return delta.reshape(p.shape), new

    def _orthogonal(self, x: Tensor) -> Tensor:
        """Of unit rms; kernels of more axes are matrices ``(first, rest)``."""
        matrix = x.reshape(x.shape[0], -1)
        o = orthogonalize(matrix, self.ns_steps) * math.sqrt(max(matrix.shape))
        return o.reshape(x.shape)


def _rms(x: Tensor) -> Tensor:
    """Root mean square, with a finite derivative where all is 0."""
    return torch.sqrt(x.square().mean() + _TINY) if x.numel() else x.new_zeros(())
