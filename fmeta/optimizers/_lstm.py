"""The coordinatewise LSTM optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmeta._coordinatewise import lift_coordinates
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import check_number
from fmeta.random import own

__all__ = ["lstm"]

Tree = Any


def lstm(
    hidden_size: int = 20,
    num_layers: int = 2,
    preprocess_factor: float = 10.0,
    output_scale: float = 0.1,
    *,
    chunk_size: int | None = None,
) -> Optimizer:
    """One LSTM, shared by all coordinates, each with a state of its own.

    ``delta = output_scale * (W h_L + b)``, where ``h_L`` is the last of ``num_layers`` LSTM layers
    that read the gradient g of the coordinate as two numbers, with ``q = preprocess_factor``:
    ``(log|g| / q, sign g)`` where ``|g| >= exp(-q)``, otherwise ``(-1, exp(q) g)``.

    Everything is finite at ``g = 0``, derivatives of every order too.

    Args:
        hidden_size: size H of the state of a layer.
        num_layers: number L of layers.
        preprocess_factor: q above, a positive number.
        output_scale: factor of the output.
        chunk_size: the most coordinates that are worked on at once (bounds the memory).

    Returns:
        An `Optimizer` with ``opt_params`` named as in `torch.nn.LSTMCell` and `torch.nn.Linear`:
        ``{"layers.0.weight_ih": (4 H, 2), "layers.0.weight_hh": (4 H, H), "layers.0.bias_ih":
        (4 H), "layers.0.bias_hh": (4 H), ..., "output.weight": (1, H), "output.bias": (1)}``,
        drawn uniformly from +-1/sqrt(H). Hidden at each leaf: ``h`` and ``c``, ``(*leaf, L, H)``.

    Raises:
        ValueError: for a size below 1, or a number that is negative or NaN.

    Example:
        >>> rule = lstm(hidden_size=4, num_layers=1)
        >>> {name: tuple(x.shape) for name, x in rule.init().items() if "output" in name}
        {'output.weight': (1, 4), 'output.bias': (1,)}

    Reference:
        Andrychowicz et al. 1606.04474, section 2.1 and appendix A.
    """
    for name, size in (("hidden_size", hidden_size), ("num_layers", num_layers)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    check_number("preprocess_factor", preprocess_factor, positive=True)
    check_number("output_scale", output_scale)

    def init(generator: torch.Generator | None = None) -> Tree:
        generator, bound = own(generator), hidden_size**-0.5

        def draw(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32).uniform_(
                -bound, bound, generator=generator
            )

        gates, params = 4 * hidden_size, {}
        for i in range(num_layers):
            params[f"layers.{i}.weight_ih"] = draw(gates, hidden_size if i else 2)
            params[f"layers.{i}.weight_hh"] = draw(gates, hidden_size)
            params[f"layers.{i}.bias_ih"] = draw(gates)
            params[f"layers.{i}.bias_hh"] = draw(gates)
        return {**params, "output.weight": draw(1, hidden_size), "output.bias": draw(1)}

    def start(th: Tree, p: Tensor) -> dict[str, Tensor]:
        zeros = p.new_zeros(p.shape[0], num_layers, hidden_size)
        return {"h": zeros, "c": zeros.clone()}

    def update(
        th: Tree, p: Tensor, g: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x = _preprocess(g, preprocess_factor)
        hs, cs = [], []
        for i, (h, c) in enumerate(zip(state["h"].unbind(-2), state["c"].unbind(-2), strict=True)):
            x, c = _cell(th, f"layers.{i}.", x, h, c)
            hs.append(x)
            cs.append(c)
        out = F.linear(x, th["output.weight"], th["output.bias"]).squeeze(-1)
        return output_scale * out, {"h": torch.stack(hs, -2), "c": torch.stack(cs, -2)}

    return lift_coordinates(init, start, update, chunk_size=chunk_size)


def _preprocess(g: Tensor, factor: float) -> Tensor:
    """Gradients ``(N,)`` as ``(N, 2)``: logarithm and sign, or near zero linear."""
    size = g.abs()
    large = size >= math.exp(-factor)
    log = torch.where(large, size, 1.0).log() / factor  # never log(0), not even unselected
    return torch.stack(
        [torch.where(large, log, -1.0), torch.where(large, g.sign(), math.exp(factor) * g)], -1
    )


def _cell(th: Tree, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.nn.LSTMCell` in plain operations, which have derivatives of every order."""
    gates = F.linear(x, th[name + "weight_ih"], th[name + "bias_ih"])
    gates = gates + F.linear(h, th[name + "weight_hh"], th[name + "bias_hh"])
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c
