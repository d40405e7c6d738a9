"""Weights of google/learned_optimization's rules: the same arrays as fmeta's rules hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta.pretrained._theta import Theta

__all__ = ["from_google"]

Tree = Any

# Inputs of the networks that do not depend on what was learned.
_MLP_INPUTS = 19
_TIME_INPUTS = 11
_RNN_INPUTS, _RNN_MLP_INPUTS = 18, 37
_NN_ADAM_INPUTS = 19
_VELO_WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
_VELO_INPUTS = 30


def from_google(rule_name: str, theta: Mapping[str, Any]) -> Tree:
    """The weights of a rule from the theta of google/learned_optimization's.

    The sizes of the networks are read from the arrays; build the rule with arguments that fit what
    it was learned with (multipliers, decays), which theta does not hold.

    Args:
        rule_name: fmeta's name of the rule or google's class (either one works):

            - ``"mlp"``, ``"MLPLOpt"``;
            - ``"adafactor_mlp"``, ``"AdafacMLPLOpt"`` (``small_fc``);
            - ``"rnn_mlp"``, ``"RNNMLPLOpt"``;
            - ``"nn_adam"``, ``"NNAdam"``;
            - ``"velo"``, ``"HyperV2"`` (with its own defaults but for sizes);
            - ``"adam"``, ``"LearnableAdam"``; ``"sgdm"``, ``"LearnableSGDM"``; ``"sgd"``,
              ``"LearnableSGD"``: for ``learn(adam, {"lr": "log", "betas": "log1m", "eps": "log"},
              eps_root=1e-8)``, ``learn(sgd, {"lr": "log", "momentum": "log1m"})``, ``learn(sgd,
              {"lr": "log"})``.
        theta: arrays (NumPy, JAX, torch) by name, flat with ``/`` between the levels, or nested
            dicts and tuples; Haiku's ``~`` may stand in the names or not, and ``.`` for ``/``.

    Returns:
        ``opt_params`` in float32, as the rule's ``init`` structures them.

    Raises:
        ValueError: for an unknown rule, or naming the first array that is missing, superfluous or
            of a wrong shape.

    Example:
        >>> import fmeta
        >>> th = from_google("LearnableSGDM", {"log_lr": -4.6, "one_minus_momentum": -2.3})
        >>> rule = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log", "momentum": "log1m"})
        >>> sorted(th) == sorted(rule.init())
        True

    Reference:
        https://github.com/google/learned_optimization.
    """
    name = _ALIASES.get(rule_name, rule_name)
    if name not in _CONVERTERS:
        classes = ", ".join(f"{ours} ({theirs})" for theirs, ours in _ALIASES.items())
        raise ValueError(f"google has no weights for the rule {rule_name!r}: there are {classes}")
    arrays = Theta(rule_name, theta)
    opt_params = _CONVERTERS[name](arrays)
    arrays.check_all_taken()
    return opt_params


# -- one function a rule -----------------------------------------------------------------------


def _mlp(a: Theta) -> Tree:
    return _layers(a, "mlp/linear_{}/{}", _MLP_INPUTS, 2, other="{1}{0}")


def _adafactor_mlp(a: Theta) -> Tree:
    decays = {k: a.take(f"{k}_decays", None) for k in ("momentum", "adafactor", "rms")}
    m, f, r = (len(x) for x in decays.values())
    # g, p; m, v, m v^-1/2, v^-1/2; six factored ones; the time.
    inputs = 2 + m + r + max(m, r) + r + 5 * f + max(m, f) + _TIME_INPUTS
    layers = _layers(a, "nn/{1}{0}", inputs, 2, other="{1}{0}")
    return {**layers, **{f"{k}_decays": x for k, x in decays.items()}}


def _rnn_mlp(a: Theta) -> Tree:
    h0, c0 = _lstm_start(a)
    h = len(h0)
    from_rnn, from_mlp = a.take("initial_from_lstm", None), a.take("initial_from_mlp", None)
    said = len(from_rnn) + len(from_mlp)
    to_mlp_w, to_mlp_b = _linear(a, "rnn_to_ff_params/rnn_to_ff", h, None)
    to_rnn_w, to_rnn_b = _linear(a, "rnn_to_in_params/rnn_to_in", h, len(from_rnn))
    lstm_w, lstm_b = _linear(a, "rnn_params/rnn/linear", _RNN_INPUTS + said + h, 4 * h)
    inputs = _RNN_MLP_INPUTS + to_mlp_w.shape[1]
    mlp = _layers(a, "ffmod_params/mlp/linear_{}/{}", inputs, 2 + len(from_mlp))
    rnn = {"lstm_w": lstm_w, "lstm_b": lstm_b, "h0": h0, "c0": c0}
    rnn |= {"to_rnn_w": to_rnn_w, "to_rnn_b": to_rnn_b, "from_rnn0": from_rnn}
    rnn |= {"to_mlp_w": to_mlp_w, "to_mlp_b": to_mlp_b, "from_mlp0": from_mlp}
    return {"rnn": rnn, "mlp": mlp}


def _nn_adam(a: Theta) -> Tree:
    h0, c0 = _lstm_start(a)
    h = len(h0)
    lstm_w, lstm_b = _linear(a, "rnn_params/rnn/linear", _NN_ADAM_INPUTS + h, 4 * h)
    control_w, control_b = _linear(a, "rnn_to_controls_params/rnn_to_controls", h, 4)
    rnn = {"lstm_w": lstm_w, "lstm_b": lstm_b, "h0": h0, "c0": c0}
    rnn |= {"control_w": control_w, "control_b": control_b}
    start = {k: a.take(f"per_layer_{k}") for k in ("lr", "beta1", "beta2", "epsilon")}
    return {"rnn": rnn, "start": start}


def _velo(a: Theta) -> Tree:
    h0, c0 = _lstm_start(a)
    h = len(h0)
    control_w, control_b = _linear(a, "rnn_params/rnn_to_controls", h, None)
    banks = len(control_b)
    rate_w, rate_b = _linear(a, "rnn_params/step_size", h, 1)
    # The output of the first of the three layers before the LSTM is not used.
    for part, shape in (("w", (_VELO_INPUTS, h)), ("b", (h,))):
        a.take(f"rnn_params/linear/{part}", *shape, optional=True)
    mix_w, mix_b = _linear(a, "rnn_params/linear_1", _VELO_INPUTS, h)
    in_w, in_b = _linear(a, "rnn_params/linear_2", _VELO_INPUTS, h)
    lstm_w, lstm_b = _linear(a, "rnn_params/rnn/linear", 2 * h, 4 * h)
    rnn = {"mix_w": mix_w, "mix_b": mix_b, "in_w": in_w, "in_b": in_b}
    rnn |= {"lstm_w": lstm_w, "lstm_b": lstm_b, "h0": h0, "c0": c0}
    rnn |= {"control_w": control_w, "control_b": control_b, "rate_w": rate_w, "rate_b": rate_b}
    b0 = a.take("ff_mod_stack/b0", banks, None)
    units = b0.shape[1]
    groups = [
        a.take(f"ff_mod_stack/w0__{i}", banks, width, units) for i, width in enumerate(_VELO_WIDTHS)
    ]
    rest = _layers(a, "ff_mod_stack/{1}{0}", units, 3, banks=(banks,), first=1)
    return {"rnn": rnn, "mlp": {"w0": torch.cat(groups, 1), "b0": b0, **rest}}


def _adam(a: Theta) -> Tree:
    lr, eps = a.take("log_lr"), a.take("log_epsilon")
    return {"lr": lr, "betas": (a.take("one_minus_beta1"), a.take("one_minus_beta2")), "eps": eps}


def _sgdm(a: Theta) -> Tree:
    return {"lr": a.take("log_lr"), "momentum": a.take("one_minus_momentum")}


def _sgd(a: Theta) -> Tree:
    return {"lr": a.take("log_lr")}


_CONVERTERS: dict[str, Callable[[Theta], Tree]] = {
    "mlp": _mlp,
    "adafactor_mlp": _adafactor_mlp,
    "rnn_mlp": _rnn_mlp,
    "nn_adam": _nn_adam,
    "velo": _velo,
    "adam": _adam,
    "sgdm": _sgdm,
    "sgd": _sgd,
}
_ALIASES = {
    "MLPLOpt": "mlp",
    "AdafacMLPLOpt": "adafactor_mlp",
    "RNNMLPLOpt": "rnn_mlp",
    "NNAdam": "nn_adam",
    "HyperV2": "velo",
    "LearnableAdam": "adam",
    "LearnableSGDM": "sgdm",
    "LearnableSGD": "sgd",
}


# -- parts of rules ----------------------------------------------------------------------------


def _linear(a: Theta, name: str, inputs: int, outputs: int | None) -> tuple[Tensor, Tensor]:
    """Matrix ``(in, out)`` and bias ``(out)`` of one layer."""
    w = a.take(f"{name}/w", inputs, outputs)
    return w, a.take(f"{name}/b", w.shape[1])


def _lstm_start(a: Theta) -> tuple[Tensor, Tensor]:
    """The LSTM's first ``h`` and ``c``, ``(H)``: kept as a pair, as named fields, or flat."""
    h = a.take("lstm_init_h", 1, None, also=("lstm_init_state/hidden", "lstm_init_state/0"))
    width = h.shape[1]
    c = a.take("lstm_init_c", 1, width, also=("lstm_init_state/cell", "lstm_init_state/1"))
    return h.squeeze(0), c.squeeze(0)


def _layers(
    a: Theta,
    pattern: str,
    inputs: int,
    outputs: int,
    *,
    other: str | None = None,
    banks: tuple[int, ...] = (),
    first: int = 0,
) -> dict[str, Tensor]:
    """``w0``, ``b0``, ... of a network of any depth.

    Args:
        pattern: names by number of the layer and ``w`` or ``b``.
        other: another form of the names.
        banks: axes before those of a layer.
        first: number of the first layer.
    """
    forms = [pattern, *([other] if other else [])]

    def is_layer(form: str, i: int) -> bool:
        return a.holds(form.format(i, "w")) or a.holds(form.format(i, "b"))

    form = next((f for f in forms if is_layer(f, first)), pattern)
    last = first
    while is_layer(form, last + 1):
        last += 1
    found = {}
    for i in range(first, last + 1):
        w, b = form.format(i, "w"), form.format(i, "b")
        width: int | None = outputs
        if i < last:  # what most arrays say, so that the one that says something else is named
            following = form.format(i + 1, "w")
            said = Counter([a.size(w, -1), a.size(b, -1), a.size(following, -2)])
            width = said.most_common(1)[0][0]
        found[f"w{i}"] = a.take(w, *banks, inputs, width)
        inputs = found[f"w{i}"].shape[-1]
        found[f"b{i}"] = a.take(b, *banks, inputs)
    return found
