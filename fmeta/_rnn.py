"""Recurrent networks in plain tensor operations, with torch's parameter names and outputs.

The kernels behind ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` have no rule for ``vmap`` and, in
cuDNN, no second derivative. The classes here replace only ``forward``: parameters, their names,
``repr`` and ``isinstance`` stay those of torch, so a built module can change its class in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, ...]
# (input part of the gates, state, hidden weight, hidden bias, projection) -> next state
Step = Callable[[Tensor, State, Tensor, Tensor | None, Tensor | None], State]


def make_pure(module: nn.Module) -> None:
    """Turn a recurrent module, in place, into its plain-operation equivalent.

    A subclass that overrides ``forward`` keeps its own: the pure class stands behind it in the
    method resolution order, so that its ``super().forward(...)`` is the pure one.

    Args:
        module: any module; those that are not recurrent stay as they are.
    """
    own = type(module)
    for torch_class, pure_class in _PURE.items():
        if own is torch_class:
            module.__class__ = pure_class
        elif isinstance(module, torch_class) and not isinstance(module, pure_class):
            module.__class__ = type(own.__name__, (own, pure_class), {"__module__": own.__module__})


def _lstm_step(
    gates: Tensor, state: State, weight: Tensor, bias: Tensor | None, projection: Tensor | None
) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weight, bias)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if projection is None else F.linear(h, projection)), c


def _gru_step(
    gates: Tensor, state: State, weight: Tensor, bias: Tensor | None, projection: Tensor | None
) -> State:
    (h,) = state
    r, z, n = gates.chunk(3, -1)
    hidden_r, hidden_z, hidden_n = F.linear(h, weight, bias).chunk(3, -1)
    n = torch.tanh(n + torch.sigmoid(r + hidden_r) * hidden_n)
    return (n + torch.sigmoid(z + hidden_z) * (h - n),)


def _elman_step(nonlinearity: str) -> Step:
    activation = {"tanh": torch.tanh, "relu": torch.relu}[nonlinearity]

    def step(
        gates: Tensor, state: State, weight: Tensor, bias: Tensor | None, projection: Tensor | None
    ) -> State:
        return (activation(gates + F.linear(state[0], weight, bias)),)

    return step


def _run(net: RNNBase, step: Step, x: Tensor, state: State) -> tuple[Tensor, State]:
    """All layers and directions over time.

    Args:
        net: holds the weights.
        step: one time step of one layer.
        x: shape ``(time, batch, features)``.
        state: tensors of shape ``(layers * directions, batch, hidden)``.

    Returns:
        Outputs ``(time, batch, directions * hidden)``, and the last state, shaped like ``state``.
    """
    directions = 2 if net.bidirectional else 1
    finals: list[State] = []
    for layer in range(net.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            weight_ih, weight_hh = (
                getattr(net, "weight_ih_" + suffix),
                getattr(net, "weight_hh_" + suffix),
            )
            bias_ih = getattr(net, "bias_ih_" + suffix) if net.bias else None
            bias_hh = getattr(net, "bias_hh_" + suffix) if net.bias else None
            projection = getattr(net, "weight_hr_" + suffix) if net.proj_size else None
            # The input's part needs no recurrence: one product for all time steps.
            gates = F.linear(x, weight_ih, bias_ih).unbind(0)
            now = tuple(s.select(0, layer * directions + direction) for s in state)
            ys = []
            for g in reversed(gates) if direction else gates:
                now = step(g, now, weight_hh, bias_hh, projection)
                ys.append(now[0])
            finals.append(now)
            outputs.append(torch.stack(ys[::-1] if direction else ys))
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if net.dropout and layer < net.num_layers - 1:
            x = F.dropout(x, net.dropout, net.training)
    return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))


def _sequence(
    net: RNNBase, step: Step, x: Tensor, state: State | None, sizes: tuple[int, ...]
) -> tuple[Tensor, State]:
    """``_run`` with torch's input forms: ``batch_first``, without a batch, without a state."""
    name = net._get_name()
    if isinstance(x, PackedSequence):
        raise ValueError(
            f"{name} got a PackedSequence, whose batch shrinks over time and so has no pure form; "
            "pad with torch.nn.utils.rnn.pad_sequence and mask the loss instead"
        )
    if x.dim() not in (2, 3) or x.shape[-1] != net.input_size:
        raise ValueError(
            f"{name} got an input of shape {tuple(x.shape)}, want 2 or 3 dimensions "
            f"with the last of size input_size={net.input_size}"
        )
    batched = x.dim() == 3
    if not batched:
        x = x.unsqueeze(1)
    elif net.batch_first:
        x = x.transpose(0, 1)
    if x.shape[0] == 0:
        raise ValueError(f"{name} got a sequence of length 0, want at least one time step")
    rows = net.num_layers * (2 if net.bidirectional else 1)
    wants = [(rows, x.shape[1], size) for size in sizes]
    if state is None:
        state = tuple(x.new_zeros(want) for want in wants)
    elif not batched:
        state = tuple(s.unsqueeze(1) for s in state)
    for s, want in zip(state, wants, strict=True):
        if s.shape != want:
            raise ValueError(
                f"{name} got an initial state of shape {tuple(s.shape)}, want {want} "
                "(layers * directions, batch, hidden); a 2-D input takes it without the batch"
            )
    out, state = _run(net, step, x, state)
    if not batched:
        return out.squeeze(1), tuple(s.squeeze(1) for s in state)
    return (out.transpose(0, 1) if net.batch_first else out), state


def _cell(cell: RNNCellBase, step: Step, x: Tensor, state: State | None, count: int) -> State:
    """One step; ``x`` of shape ``(input_size,)`` or ``(batch, input_size)``."""
    name = cell._get_name()
    if x.dim() not in (1, 2) or x.shape[-1] != cell.input_size:
        raise ValueError(
            f"{name} got an input of shape {tuple(x.shape)}, want 1 or 2 dimensions "
            f"with the last of size input_size={cell.input_size}"
        )
    want = (*x.shape[:-1], cell.hidden_size)
    if state is None:
        state = (x.new_zeros(want),) * count
    for s in state:
        if s.shape != want:
            raise ValueError(f"{name} got a state of shape {tuple(s.shape)}, want {want}")
    bias_ih, bias_hh = cast("Tensor | None", cell.bias_ih), cast("Tensor | None", cell.bias_hh)
    gates = F.linear(x, cell.weight_ih, bias_ih)
    return step(gates, state, cell.weight_hh, bias_hh, None)


class _Pure:
    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("_Pure")

    def flatten_parameters(self) -> None:
        """Nothing: there is no cuDNN weight block here, and the weights are arguments."""


class _PureLSTM(_Pure, nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return _sequence(
            self, _lstm_step, input, hx, (self.proj_size or self.hidden_size, self.hidden_size)
        )


class _PureGRU(_Pure, nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        state = None if hx is None else (hx,)
        out, (last,) = _sequence(self, _gru_step, input, state, (self.hidden_size,))
        return out, last


class _PureRNN(_Pure, nn.RNN):
    def forward(self, input: Any, hx: Any = None) -> Any:
        state, step = None if hx is None else (hx,), _elman_step(self.nonlinearity)
        out, (last,) = _sequence(self, step, input, state, (self.hidden_size,))
        return out, last


class _PureLSTMCell(_Pure, nn.LSTMCell):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return _cell(self, _lstm_step, input, hx, 2)


class _PureGRUCell(_Pure, nn.GRUCell):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return _cell(self, _gru_step, input, None if hx is None else (hx,), 1)[0]


class _PureRNNCell(_Pure, nn.RNNCell):
    def forward(self, input: Any, hx: Any = None) -> Any:
        state, step = None if hx is None else (hx,), _elman_step(self.nonlinearity)
        return _cell(self, step, input, state, 1)[0]


_PURE: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: _PureLSTM,
    nn.GRU: _PureGRU,
    nn.RNN: _PureRNN,
    nn.LSTMCell: _PureLSTMCell,
    nn.GRUCell: _PureGRUCell,
    nn.RNNCell: _PureRNNCell,
}
