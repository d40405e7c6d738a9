"""Adam whose hyper-parameters a recurrent network moves, for each tensor by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta._treewise import treewise
from fmeta.optimizer import Optimizer
from fmeta.optimizers._common import check_number, ema
from fmeta.optimizers._initial import truncated_normal
from fmeta.optimizers._tensor_rnn import log_size, lstm_step, mean_and_variance
from fmeta.random import own

__all__ = ["nn_adam"]

Tree = Any

_INPUTS = 19
_CLIP = 1000.0
# The four numbers are kept as a tenth of a logarithm, of lr, 1 - beta1, 1 - beta2 and epsilon, and
# stay between these (of the logarithm), in the order of the network's outputs.
_RANGES = {
    "lr": (math.log(1e-8), math.log(1e3)),
    "beta1": (-10.0, 0.0),
    "beta2": (-10.0, 0.0),
    "epsilon": (math.log(1e-11), math.log(1e4)),
}
_SCALE = 10.0


def nn_adam(
    output_scale: float = 0.01,
    initial_learning_rate: float = 1e-4,
    initial_beta1: float = 0.9,
    initial_beta2: float = 0.999,
    initial_epsilon: float = 1e-8,
    decay_strength: float = 0.0,
    lstm_hidden_size: int = 32,
) -> Optimizer:
    """Adam whose four numbers a recurrent network moves, for each tensor by itself.

    ``p -= lr (1 + eps) m / (eps + sqrt(v + 1e-10))``, where m and v are averages of the gradient
    (clamped to +-1000) and its square with decays beta1 and beta2, not corrected for their start at
    zero; lr, eps, beta1 and beta2 are the tensor's own.

    A recurrent network (an LSTM) sees each tensor once a step: mean and variance of m, v, the
    parameters and the gradients, its number of axes and its four numbers now. It moves them, from
    the next step on, in the coordinates ``u = log(lr) / 10, log(1 - beta1) / 10, log(1 - beta2) /
    10, log(eps) / 10``: ``u += output_scale * out``, then ``u -= decay_strength * (u - start)``,
    kept within lr in [1e-8, 1e3], 1 - beta in [e^-10, 1], eps in [1e-11, 1e4].

    With a large eps the rule is gradient descent with momentum of rate lr; the factor 1 + eps makes
    that so without a large lr. Untrained the numbers stay at their start, which is learned too.

    Args:
        output_scale: how fast the numbers can be moved.
        initial_learning_rate, initial_beta1, initial_beta2, initial_epsilon: the start, for
            ``init``.
        decay_strength: how fast the numbers return to their start.
        lstm_hidden_size: H, for ``init``; weights of another size work too.

    Returns:
        An `Optimizer` with ``opt_params = {"rnn": {"lstm_w": (19 + H, 4 H), "lstm_b": (4 H),
        "control_w": (H, 4), "control_b": (4), "h0": (H), "c0": (H)}, "start": {"lr": (), "beta1":
        (), "beta2": (), "epsilon": ()}}`` (``x @ w + b``; ``start`` as u). Hidden at each leaf:
        ``m`` and ``v`` ``(*leaf)``; ``lr``, ``beta1``, ``beta2``, ``epsilon`` ``()``, as u; under
        ``"tensor"`` the LSTM's ``h`` and ``c``.

    Raises:
        ValueError: a number that is negative, not finite or out of its range, a size below 1.

    Example:
        >>> rule = nn_adam(initial_learning_rate=0.01)
        >>> params = {"w": torch.ones(2)}
        >>> state = rule.init_hidden(rule.init(), params)
        >>> rule.step(rule.init(), params, params, state)[0]
        {'w': tensor([0.9684, 0.9684])}

    Reference:
        `NNAdam` of google/learned_optimization; Adam: Kingma and Ba 1412.6980.
    """
    check_number("output_scale", output_scale)
    check_number("decay_strength", decay_strength)
    whole = isinstance(lstm_hidden_size, int) and not isinstance(lstm_hidden_size, bool)
    if not whole or lstm_hidden_size < 1:
        raise ValueError(f"lstm_hidden_size must be a positive integer, got {lstm_hidden_size!r}")
    numbers = {
        "initial_learning_rate": initial_learning_rate,
        "initial_epsilon": initial_epsilon,
        "initial_beta1": initial_beta1,
        "initial_beta2": initial_beta2,
    }
    for name, number in numbers.items():
        if "beta" in name:
            check_number(name, number, below=1)
        else:
            check_number(name, number, positive=True)
    start = {
        "lr": math.log(initial_learning_rate),
        "beta1": math.log1p(-initial_beta1),
        "beta2": math.log1p(-initial_beta2),
        "epsilon": math.log(initial_epsilon),
    }
    for key, (name, given) in zip(
        ("lr", "epsilon", "beta1", "beta2"), numbers.items(), strict=True
    ):
        low, high = _RANGES[key]
        if not low - 1e-9 <= start[key] <= high + 1e-9:
            what = f"1 - {name}" if "beta" in key else name
            raise ValueError(
                f"{what} must be from {math.exp(low):.3g} to {math.exp(high):.3g}, the range that "
                f"the network moves it in, got {name}={given}"
            )
    return treewise(_Rule(output_scale, decay_strength, lstm_hidden_size, start))


class _Rule:
    def __init__(
        self, output_scale: float, decay_strength: float, size: int, start: dict[str, float]
    ) -> None:
        self.output_scale, self.decay_strength = output_scale, decay_strength
        self.size, self.start = size, start

    def init(self, generator: torch.Generator | None = None) -> Tree:
        h = self.size
        rnn = {
            "lstm_w": truncated_normal((_INPUTS + h, 4 * h), own(generator)),
            "lstm_b": torch.zeros(4 * h),
            "control_w": torch.zeros(h, 4),
            "control_b": torch.zeros(4),
            "h0": torch.zeros(h),
            "c0": torch.zeros(h),
        }
        start = {k: torch.tensor(x / _SCALE, dtype=torch.float32) for k, x in self.start.items()}
        return {"rnn": rnn, "start": start}

    def init_hidden(self, th: Tree, p: Tensor) -> dict[str, Tensor]:
        numbers = {name: th["start"][name].clone() for name in _RANGES}
        return {"m": torch.zeros_like(p), "v": torch.zeros_like(p), **numbers}

    def init_tensor(self, th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {"h": th["rnn"]["h0"].clone(), "c": th["rnn"]["c0"].clone()}

    def observe(
        self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], shared: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        g = g.clamp(-_CLIP, _CLIP)
        beta1, beta2 = (1 - _exponential(h, name) for name in ("beta1", "beta2"))
        h = {**h, "m": ema(h["m"], g, beta1), "v": ema(h["v"], g * g, beta2)}
        return _features(p, g, h), h

    def mix(
        self, th: Tree, summaries: Tensor, tensors: dict[str, Tensor], shared: Any
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        rnn = th["rnn"]
        out, tensors = lstm_step(rnn["lstm_w"], rnn["lstm_b"], summaries, tensors)
        return self.output_scale * (out @ rnn["control_w"] + rnn["control_b"]), tensors, shared

    def update(
        self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], control: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lr, epsilon = _exponential(h, "lr"), _exponential(h, "epsilon")
        delta = -lr * (1 + epsilon) / (epsilon + torch.sqrt(h["v"] + 1e-10)) * h["m"]
        new = {}
        for name, change in zip(_RANGES, control.unbind(0), strict=True):
            u = h[name] + change
            new[name] = _settled(name, u - self.decay_strength * (u - th["start"][name]))
        return delta, {**h, **new}


def _settled(name: str, u: Tensor) -> Tensor:
    """Within the range, and by way of the number itself, whose rounding the reference keeps.

    A beta of 0.999 has room for three digits of 1 - beta in float32: weights learned with that.
    """
    u = _SCALE * u
    low, high = _RANGES[name]
    if name.startswith("beta"):
        beta = 1 - torch.exp(u.clamp(low, high))
        return torch.log(1 - beta) / _SCALE
    return torch.log(torch.exp(u).clamp(math.exp(low), math.exp(high))) / _SCALE


def _exponential(h: dict[str, Tensor], name: str) -> Tensor:
    """lr, epsilon, 1 - beta1 or 1 - beta2 itself."""
    return torch.exp((_SCALE * h[name]).clamp(*_RANGES[name]))


def _features(p: Tensor, g: Tensor, h: dict[str, Tensor]) -> Tensor:
    """What the network sees of a tensor, ``(19,)``, in the order of its weights."""
    (mean_p, var_p), (mean_g, var_g) = mean_and_variance(p), mean_and_variance(g)
    (mean_m, var_m), (mean_v, var_v) = mean_and_variance(h["m"]), mean_and_variance(h["v"])
    mean_size, _ = mean_and_variance(g.abs())
    means = torch.stack([mean_g, mean_size, mean_m, mean_p, mean_v])
    size_g, size_abs, size_m, size_p, size_v = (log_size(means) / 2).unbind(0)
    sign_g, _, sign_m, sign_p, sign_v = means.sign().unbind(0)
    numbers = {k: h[k].clamp(-5, 5) / 5 for k in _RANGES}
    bias, scalar = (p.new_full((), 1.0 if p.ndim == n else -1.0) for n in (1, 0))
    variances = log_size(torch.stack([var_g, var_m, var_p, var_v])) / 2
    head = [numbers["beta1"], numbers["beta2"], numbers["epsilon"], bias, scalar, numbers["lr"]]
    head += [size_g, sign_g, size_abs, size_m, sign_m, size_p, sign_p, size_v, sign_v]
    return torch.cat([torch.stack(head), variances])
