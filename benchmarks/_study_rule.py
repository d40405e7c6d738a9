"""The rule of a feasibility study, whose speed of meta-training `meta_training.py` compares with.

Nine directions (bounded by 5) under gates of a network 18-12-12-9 that sees each coordinate; a
per-tensor network 13-12-2 gives the rate and what an integrator adds to it. Built from the study's
description, where that is silent (products, order) by guess; it is here for its cost alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fmeta

DECAYS = (0.5, 0.9, 0.98)


def study_rule() -> fmeta.Optimizer:
    return fmeta.tensorwise(_Rule())


class _Rule:
    needs = frozenset({"num_steps"})

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / math.sqrt(shape[0])

        return {
            "lr": torch.zeros(()),
            "w0": random(12, 12),
            "u0": random(6, 12),
            "b0": torch.zeros(12),
            "w1": random(12, 12),
            "b1": torch.zeros(12),
            "w2": 0.1 * random(12, 9),
            "b2": torch.eye(9)[2] + torch.eye(9)[7],
            "tw0": random(13, 12),
            "tb0": torch.zeros(12),
            "tw1": 0.1 * random(12, 2),
        }

    def init_hidden(self, th: Any, p: Tensor, num_steps: Any) -> dict[str, Tensor]:
        row, col = (p.shape[:-1], (*p.shape[:-2], p.shape[-1])) if p.ndim > 1 else (p.shape,) * 2
        zero = p.new_zeros(())
        total = torch.as_tensor(num_steps, device=p.device).to(p.dtype)
        return {
            **{name: torch.zeros_like(p) for name in ("m0", "m1", "m2", "v", "last")},
            "row": p.new_zeros(row),
            "col": p.new_zeros(col),
            "t": zero,
            "sum": zero,
            "total": total + zero,
        }

    def update(
        self, th: Any, p: Tensor, g: Tensor, h: dict[str, Tensor], loss: Any, extras: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t, square = h["t"], g * g
        m = [torch.lerp(h[f"m{i}"], g, 1 - d) for i, d in enumerate(DECAYS)]
        v = torch.lerp(h["v"], square, 0.02)
        if p.ndim > 1:
            row = torch.lerp(h["row"], square.mean(-1), 0.05)
            col = torch.lerp(h["col"], square.mean(-2), 0.05)
            factor = torch.rsqrt(row / (row.mean() + 1e-30) + 1e-12).unsqueeze(-1) * torch.rsqrt(
                col + 1e-20
            ).unsqueeze(-2)
            sizes = torch.log(row + 1e-20).unsqueeze(-1) + torch.log(col + 1e-20).unsqueeze(-2)
            orthogonal = _newton_schulz(m[1]) * math.sqrt(max(p.shape))
        else:
            row = col = torch.lerp(h["row"], square, 0.05)
            factor = torch.rsqrt(row + 1e-20)
            sizes = 2 * torch.log(row + 1e-20)
            orthogonal = m[1] * factor
        root = torch.rsqrt(v + 1e-20)
        momentum = torch.stack([g, *m]) * root
        rms_m, rms_p = _rms(m[1]), _rms(p)
        bases = torch.cat(
            [
                momentum,
                torch.stack([m[1] * factor, m[2] * factor, m[1] / rms_m, orthogonal, p / rms_p]),
            ]
        )
        bases = bases.reshape(9, -1).clamp(-5, 5)
        more = torch.stack(
            [(momentum[0] * momentum[2]).flatten(), v.log().flatten(), sizes.flatten()]
        )
        told = torch.cat([bases.abs(), more])
        cosine = (g * h["last"]).mean() / (_rms(g) * _rms(h["last"]))
        signal, matrix = _rms(momentum[2]), p.new_full((), float(p.ndim > 1))
        time = [t / h["total"], torch.log1p(t), torch.log(h["total"])]
        seen = torch.stack([*time, matrix, signal, cosine])
        bias = seen @ th["u0"] + th["b0"]
        x = torch.relu(th["w0"].mT @ told + bias.unsqueeze(1))
        x = torch.relu(th["w1"].mT @ x + th["b1"].unsqueeze(1))
        gates = th["w2"].mT @ x + th["b2"].unsqueeze(1)
        u = (gates * bases).sum(0).reshape(p.shape)
        u = u / _rms(u)
        size = [rms_p.log(), _rms(g).log(), rms_m.log(), h["sum"]]
        shape = [p.new_full((), math.log(p.numel())), v.mean().log(), 1 - time[0]]
        out = torch.relu(torch.stack([*seen.unbind(), *size, *shape]) @ th["tw0"] + th["tb0"])
        rate, push = (out @ th["tw1"]).unbind()
        total = h["sum"] + 0.01 * torch.tanh(push)
        warm = ((t + 1) / (0.05 * h["total"] + 1)).clamp(max=1)
        scale = 0.003 * warm * (1 - 0.98 * time[0]) * torch.sqrt(rms_p / 0.1)
        delta = -scale * torch.exp(th["lr"] + rate + total) * u
        new = {f"m{i}": x for i, x in enumerate(m)}
        new.update(v=v, last=delta, row=row, col=col, t=t + 1, sum=total, total=h["total"])
        return delta, new


def _rms(x: Tensor) -> Tensor:
    return torch.sqrt(x.square().mean() + 1e-20)


def _newton_schulz(x: Tensor) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x * torch.rsqrt(x.square().sum() + 1e-20)
    for _ in range(4):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if tall else x
