"""VeLO: a recurrent network for each tensor makes the network that steps its coordinates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmeta import trees
from fmeta._treewise import treewise
from fmeta.optimizer import Optimizer
from fmeta.optimizers import _velo_features, _velo_net, _velo_tensor
from fmeta.optimizers._common import check_number
from fmeta.optimizers._features import is_unobserved
from fmeta.optimizers._initial import truncated_normal
from fmeta.optimizers._velo_features import MOMENTS, Decays, Net
from fmeta.optimizers._velo_net import TILE
from fmeta.random import own

__all__ = ["velo"]

Tree = Any

_OUTPUTS = 3


def velo(
    lstm_hidden_size: int = 128,
    param_inits: int = 64,
    hidden_size: int = 4,
    hidden_layers: int = 2,
    initial_momentum_decays: Sequence[float] = (0.9, 0.99, 0.999),
    initial_rms_decays: Sequence[float] = (0.999,),
    initial_adafactor_decays: Sequence[float] = (0.9, 0.99, 0.999),
    exp_mult: float = 0.001,
    step_mult: float = 0.001,
    lr: Any = 1.0,
    weight_decay: float = 0.0,
    chunk_size: int | None = None,
) -> Optimizer:
    """VeLO: ``p -= lr r s step_mult d exp(exp_mult e)``, d and e of a network made for the tensor.

    A recurrent network (an LSTM) sees each tensor once a step: how much of the training is done,
    how the loss compares with its averages, the tensor's number of axes, and the mean and variance
    of its moments. The tensors exchange the maximum of a layer of features; their order does not
    matter. For each tensor it gives the rate r and P controls; the weights of the small network
    30-4-4-3 (ReLU) that sees the coordinates are the P banks of weights, each times its control,
    averaged, times 100. s is the root mean square of the parameters.

    The small network's features are made of the gradient g (clamped to +-1000), the parameter p,
    three momenta m (decays .9, .99, .999), the second moment v (.999) and factored ones r, c over
    rows and columns (.9, .99, .999), with Adafactor's factors f_r, f_c of them: ``g; clip(g, +-.1);
    p; m; v; m v^-1/2; v^-1/2; g f_r f_c; g v^-1/2; r; c; r^-1/2; c^-1/2; m f_r f_c``, each divided
    by its root mean square over the tensor. A tensor with fewer than two axes has its second
    moments for r and c. Nothing is corrected for its start at zero.

    The published rule has ``lstm_hidden_size=512, param_inits=256`` and no learning rate to tune.
    The weights of other sizes than these arguments work too: the arguments are those of ``init``.

    Where no derivative is recorded, a large tensor is worked on in tiles that stay in cache, with
    the same results to rounding.

    Args:
        lstm_hidden_size: H.
        param_inits: P, the number of banks.
        hidden_size, hidden_layers: of the small network.
        initial_momentum_decays, initial_rms_decays, initial_adafactor_decays: three, one and three
            decays, rounded to float32.
        exp_mult, step_mult: as above.
        lr: factor of all steps: a number or a scalar tensor.
        weight_decay: after the step ``p *= 1 - lr * weight_decay``.
        chunk_size: coordinates a tile, where no derivative is recorded. Default: a size that suits
            the caches on a CPU, the whole tensor elsewhere.

    Returns:
        An `Optimizer` that needs ``loss`` and ``num_steps``. ``opt_params = {"rnn": {...}, "mlp":
        {...}}`` (``x @ w + b``): of the recurrent network ``mix_w`` (30, H), ``mix_b``, ``in_w``
        (30, H), ``in_b``, ``lstm_w`` (2 H, 4 H), ``lstm_b``, ``control_w`` (H, P), ``control_b``,
        ``rate_w`` (H, 1), ``rate_b``, ``h0`` (H), ``c0`` (H); banks ``w0`` (P, 30, 4), ``b0``
        (P, 4), ``w1`` (P, 4, 4), ``b1``, ``w2`` (P, 4, 3), ``b2``. Hidden at each leaf: ``m0``,
        ``m1``, ``m2``, ``rms`` ``(*leaf)``; ``row`` and ``col`` ``(*leaf without its largest,
        second largest axis, 3)``, or for a tensor with fewer axes ``v`` ``(*leaf, 3)``; under
        ``"tensor"`` the LSTM's ``h`` and ``c``. Shared: ``t``, ``num_steps``, ``losses`` and
        ``lowest`` (10).

    Raises:
        ValueError: a size below 1, a number that is negative or not finite, decays that are not as
            many or not in [0, 1].

    Example:
        >>> rule = velo(lstm_hidden_size=8, param_inits=4)
        >>> params = {"w": torch.ones(2, 2)}
        >>> state = rule.init_hidden(rule.init(), params, num_steps=10)
        >>> new, state = rule.step(rule.init(), params, params, state, loss=torch.tensor(4.0))
        >>> new["w"].shape, int(state.shared["t"])
        (torch.Size([2, 2]), 1)

    Reference:
        Metz et al. 2211.09760, sections 2 and appendix (architecture); `HyperV2` of
        google/learned_optimization. Where axes are equal, which of them counts as the largest
        follows PyLO.
    """
    sizes = {
        "lstm_hidden_size": lstm_hidden_size,
        "param_inits": param_inits,
        "hidden_size": hidden_size,
        "hidden_layers": hidden_layers,
    }
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    for name, number in (("lr", lr), ("weight_decay", weight_decay)):
        check_number(name, number)
    check_number("exp_mult", exp_mult)
    check_number("step_mult", step_mult)
    decays = Decays(
        _decays("initial_momentum_decays", initial_momentum_decays, 3),
        _decays("initial_rms_decays", initial_rms_decays, 1),
        _decays("initial_adafactor_decays", initial_adafactor_decays, 3),
    )
    rule = _Rule(decays, exp_mult, step_mult, lr, weight_decay, chunk_size)
    rule.sizes = (lstm_hidden_size, param_inits, hidden_size, hidden_layers)
    return treewise(rule)


class _Rule:
    needs = frozenset({"loss", "num_steps"})
    batched = True  # stacks of leaves are taken as they are
    owning = True
    sizes: tuple[int, int, int, int]

    def __init__(
        self,
        decays: Decays,
        exp_mult: float,
        step_mult: float,
        lr: Any,
        weight_decay: Any,
        chunk_size: int | None,
    ) -> None:
        self.decays, self.exp_mult, self.step_mult = decays, exp_mult, step_mult
        self.lr, self.weight_decay, self.chunk_size = lr, weight_decay, chunk_size

    def init(self, generator: torch.Generator | None = None) -> Tree:
        generator = own(generator)
        h, banks, units, layers = self.sizes

        rnn = {}
        inputs = _velo_tensor.INPUTS
        shapes = {
            "mix": (inputs, h),
            "in": (inputs, h),
            "lstm": (2 * h, 4 * h),
            "control": (h, banks),
            "rate": (h, 1),
        }
        for name, shape in shapes.items():
            rnn[f"{name}_w"] = truncated_normal(shape, generator)
            rnn[f"{name}_b"] = torch.zeros(shape[1])
        rnn |= {"h0": torch.zeros(h), "c0": torch.zeros(h)}
        mlp, widths = {}, [_velo_features.INPUTS, *[units] * layers, _OUTPUTS]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            mlp[f"w{i}"] = truncated_normal((banks, before, after), generator)
            # Small, not zero: no coordinate starts exactly at the kink of a ReLU.
            mlp[f"b{i}"] = 0.01 * torch.randn(banks, after, generator=generator)
        return {"rnn": rnn, "mlp": mlp}

    def init_hidden(self, th: Tree, p: Tensor) -> dict[str, Tensor]:
        state = {name: torch.zeros_like(p) for name in MOMENTS}
        if p.ndim < 2:
            return {**state, "v": p.new_zeros(*p.shape, 3)}
        d1, d0 = _velo_features.factored_axes(p.shape)
        for name, axis in (("row", d0), ("col", d1)):  # in the order of later states: one graph
            state[name] = p.new_zeros(*[n for i, n in enumerate(p.shape) if i != axis], 3)
        return state

    def init_tensor(self, th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {"h": th["rnn"]["h0"].clone(), "c": th["rnn"]["c0"].clone()}

    def init_shared(self, th: Tree, params: Tree, *, num_steps: Any) -> dict[str, Tensor]:
        found = [p for p in trees.leaves(params) if p is not None] or [torch.zeros(())]
        dtype = trees.compute_dtype(found[0])
        for p in found:
            dtype = torch.promote_types(dtype, trees.compute_dtype(p))
        total = torch.as_tensor(num_steps, device=found[0].device).to(dtype)
        t = torch.zeros_like(total, dtype=torch.int64)
        return {"t": t, "num_steps": total, **_velo_tensor.start_losses(total)}

    def summary(
        self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], batch: int = 0
    ) -> Tensor:
        return _velo_tensor.summary(p, h, batch)

    def mix(
        self,
        th: Tree,
        summaries: Tensor,
        tensors: dict[str, Tensor],
        shared: dict[str, Tensor],
        loss: Tensor,
        extras: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        seen, shared = _velo_tensor.training(shared, loss)
        x = _velo_tensor.inputs(seen, summaries)
        controls, rate, tensors = _velo_tensor.mixed(th["rnn"], x, tensors)
        # The weights of all tensors in one product: what a tensor is told is its own network.
        flat = torch.cat([x.flatten(1) for x in _layers(th["mlp"])], 1)
        weights = controls @ flat * (100.0 / len(flat))
        return torch.cat([rate, weights], 1), tensors, shared

    def update(
        self,
        th: Tree,
        p: Tensor,
        g: Tensor,
        h: dict[str, Tensor],
        control: Tensor,
        batch: int = 0,
        own: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if p.numel() == 0:
            return torch.zeros_like(p), h
        if batch:
            return self._update_stack(th, p, g, h, control, own)
        one = {name: x.unsqueeze(0) for name, x in h.items()}
        delta, new = self._update_stack(
            th, p.unsqueeze(0), g.unsqueeze(0), one, control.unsqueeze(0), own
        )
        return delta.squeeze(0), {name: x.squeeze(0) for name, x in new.items()}

    def _update_stack(
        self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], control: Tensor, own: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rate, weights = control.split((1, control.shape[1] - 1), 1)
        net, flat = _net(th["mlp"], weights), p.reshape(p.shape[0], -1)
        size = self.chunk_size or (TILE if p.device.type == "cpu" else p.numel())
        seen = (p, g, control, *h.values(), self.lr, self.weight_decay)
        many = p.numel() > size or (p.shape[0] > 1 and p.device.type == "cpu")
        tiled = many and is_unobserved(*[x for x in seen if isinstance(x, Tensor)])
        if tiled:
            step, h = _velo_net.tiled_steps(net, p, g, h, self.decays, self.exp_mult, size, own)
            squares = torch.linalg.vector_norm(flat, dim=1, keepdim=True).square()
        else:
            step, h = _velo_net.steps(net, p, g, h, self.decays, self.exp_mult)
            squares = flat.square().sum(1, keepdim=True)
        scale = torch.sqrt(squares / flat.shape[1] + 1e-9)
        factor = (rate * scale * (-self.step_mult * self.lr)).reshape(-1, *(1,) * (p.ndim - 1))
        delta = step.mul_(factor) if tiled else step * factor
        if isinstance(self.weight_decay, (int, float)) and self.weight_decay == 0:
            return delta, h
        return delta - self.lr * self.weight_decay * (p + delta), h


def _layers(mlp: Tree) -> list[Tensor]:
    """Weights and bias of one layer after another."""
    return [mlp[f"{kind}{i}"] for i in range(len(mlp) // 2) for kind in "wb"]


def _net(mlp: Tree, flat: Tensor) -> Net:
    """The networks of a stack, from the flat form ``(B, *)`` that `_Rule.mix` gives."""
    banks = _layers(mlp)
    parts = flat.split([x.shape[1:].numel() for x in banks], 1)
    found = [x.reshape(-1, *bank.shape[1:]) for x, bank in zip(parts, banks, strict=True)]
    return Net(tuple(found[::2]), tuple(found[1::2]))


def _decays(name: str, values: Sequence[float], count: int) -> tuple[float, ...]:
    found = tuple(float(x) for x in values)
    if len(found) != count or not all(0 <= x <= 1 for x in found):
        raise ValueError(f"{name} must be {count} numbers from 0 to 1, got {values!r}")
    # Both references hold them in float32, where 1 - .999 is 1.3e-5 off: weights learned with it.
    return tuple(float(np.float32(x)) for x in found)
