"""The LSTM whose cell state is the model's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta._coordinatewise import lift_coordinates
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import check_number
from fmeta.optimizers._lstm import _cell, _preprocess
from fmeta.random import own

__all__ = ["meta_lstm"]

Tree = Any


def meta_lstm(
    hidden_size: int = 20,
    preprocess_factor: float = 10.0,
    forget_bias: float = 5.0,
    input_bias: float = -4.0,
    *,
    chunk_size: int | None = None,
) -> Optimizer:
    """Learned forget and input gates of every coordinate: ``p <- f p - i g``.

    An LSTM reads gradient g and loss, each as two numbers (logarithm and sign, as in `lstm`); from
    its output h, the parameter and the gate of the step before,

        i = sigmoid(W_i [h, p, i] + b_i),    f = sigmoid(W_f [h, p, f] + b_f),

    so that i is a rate and 1 - f a decay, each of the coordinate and the step. The cell state that
    the gates act on is the parameter itself; a learned initial cell state is a learned
    initialisation (`fmeta.fewshot.meta_lstm`). Weights are shared by all coordinates.

    Args:
        hidden_size: size H of the LSTM's state.
        preprocess_factor: q of the inputs, a positive number.
        forget_bias: b_f at the start; 5 keeps 99.3 % of a parameter.
        input_bias: b_i at the start; -4 is a rate of 0.018.
        chunk_size: the most coordinates that are worked on at once (bounds the memory).

    Returns:
        An `Optimizer` that needs ``"loss"``. ``opt_params``: those of the LSTM,
        ``"layers.0.weight_ih": (4 H, 4)`` and so on, and of the gates, ``"gates.weight": (2, H +
        2)`` and ``"gates.bias": (2)``, in the order i, f. Hidden at each leaf: ``h`` and ``c``,
        ``(*leaf, H)``, and ``gates``, ``(*leaf, 2)``.

    Raises:
        ValueError: for a size below 1, or a number that is negative or NaN where it must not be.

    Reference:
        Ravi, Larochelle, "Optimization as a model for few-shot learning" (ICLR 2017, rJY0-Kcll),
        section 3.2 and appendix.
    """
    if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
        raise ValueError(f"hidden_size must be a positive integer, got {hidden_size!r}")
    check_number("preprocess_factor", preprocess_factor, positive=True)
    biases = torch.tensor([float(input_bias), float(forget_bias)])

    def init(generator: torch.Generator | None = None) -> Tree:
        generator, bound = own(generator), hidden_size**-0.5

        def draw(*shape: int, scale: float = bound) -> Tensor:
            return scale * (2 * torch.rand(shape, generator=generator) - 1)

        gates = 4 * hidden_size
        return {
            "layers.0.weight_ih": draw(gates, 4),
            "layers.0.weight_hh": draw(gates, hidden_size),
            "layers.0.bias_ih": draw(gates),
            "layers.0.bias_hh": draw(gates),
            "gates.weight": draw(2, hidden_size + 2, scale=0.01),  # at first the biases rule
            "gates.bias": biases.clone(),
        }

    def start(th: Tree, p: Tensor) -> dict[str, Tensor]:
        zeros = p.new_zeros(p.shape[0], hidden_size)
        return {"h": zeros, "c": zeros.clone(), "gates": p.new_zeros(p.shape[0], 2)}

    def update(
        th: Tree,
        p: Tensor,
        g: Tensor,
        state: dict[str, Tensor],
        *,
        loss: Tensor | None = None,
        extras: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert loss is not None
        seen = _preprocess(loss.to(g.dtype).reshape(1), preprocess_factor)
        x = torch.cat([_preprocess(g, preprocess_factor), seen.expand(g.shape[0], 2)], -1)
        h, c = _cell(th, "layers.0.", x, state["h"], state["c"])
        w = th["gates.weight"]
        size = w.shape[1] - 2
        seen_by, own_part = w.narrow(1, 0, size), p.unsqueeze(1) * w.select(1, size)
        own_part = own_part + state["gates"] * w.select(1, size + 1)
        gates = torch.sigmoid(h @ seen_by.T + own_part + th["gates.bias"])
        i, f = gates.unbind(-1)
        # 1 - f by the other sigmoid would keep more digits; a parameter loses none that it has.
        return (f - 1) * p - i * g, {"h": h, "c": c, "gates": gates}

    return lift_coordinates(init, start, update, chunk_size=chunk_size, needs=frozenset({"loss"}))
