"""Weights of PyLO's networks: which network some arrays are, and the same for fmeta's rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizers._normalized_mlp import from_celo2
from fmeta.pretrained._finite import check_finite

__all__ = ["Found", "from_pylo", "recognised"]

_INPUTS = 39  # features of MetaMLP
# What PyLO's AdafacLO gives any MetaMLP by itself: the rule's decays and its step size were learned
# and chosen with MuLO's weights, but are no part of their file.
_DECAYS = {
    "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
    "rms_decays": (0.01079706,),
    "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
}
_STEP_MULT = 0.01

_LINEAR = {
    "mix": "mix_layer2",
    "in": "final_mix_layer",
    "lstm": "lstm.linear",
    "control": "rnn_to_controls",
    "rate": "step_size",
}
_STARTS = {"h0": "lstm_init_state.0", "c0": "lstm_init_state.1"}
# Names by which a network is known, even when others of its arrays are missing.
_MARKS = {
    "MetaMLP": ("network.",),
    "CELO2MLP": ("w0.", "dense_w.", "dense_b."),
    "VeLOMLP": ("input_weights_", "input_bias_", "hidden_weights_.", "output_weights_"),
    "VeLORNN": ("lstm.linear.", "rnn_to_controls.", "step_size.", "mix_layer", "lstm_init_state."),
}
_RULES = {
    "adafactor_mlp": ("MetaMLP",),
    "normalized_mlp": ("CELO2MLP",),
    "velo": ("VeLOMLP", "VeLORNN"),
}


class Found(NamedTuple):
    """A rule's weights, and the arguments of its builder that PyLO uses with them."""

    rule_name: str
    arguments: dict[str, Any]
    opt_params: dict[str, Any]


def from_pylo(rule_name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a rule from the state dict of PyLO's network.

    Args:
        rule_name: ``"adafactor_mlp"`` for a ``MetaMLP`` (AdafacLO, MuLO), ``"normalized_mlp"`` for
            a ``CELO2MLP``, ``"velo"`` for a ``VeLOMLP`` and a ``VeLORNN`` (their dicts in one).
        state_dict: tensors or NumPy arrays by PyLO's names. The decays of ``adafactor_mlp`` are in
            no such file: each becomes what PyLO's AdafacLO has by itself, unless the dict holds it
            (``momentum_decays``, ``rms_decays``, ``adafactor_decays``).

    Returns:
        ``opt_params`` in float32, as the rule's ``init`` structures them.

    Raises:
        ValueError: for another rule, or naming the first array that is missing, superfluous or of a
            wrong shape.

    Example:
        >>> import torch
        >>> layers = {"input": torch.nn.Linear(39, 4), "output": torch.nn.Linear(4, 2)}
        >>> state_dict = torch.nn.ModuleDict({"network": torch.nn.ModuleDict(layers)}).state_dict()
        >>> from_pylo("adafactor_mlp", state_dict)["w0"].shape
        torch.Size([39, 4])

    Reference:
        PyLO, https://github.com/Belilovsky-Lab/pylo.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state dict holds arrays by name, got a {type(state_dict).__name__}")
    for name, x in state_dict.items():
        if not hasattr(x, "shape"):
            raise ValueError(f"{name} is a {type(x).__name__}, not a tensor or NumPy array")
    if rule_name not in _RULES:
        raise ValueError(
            f"PyLO has no weights for the rule {rule_name!r}: there are those of "
            f"{', '.join(_RULES)}"
        )
    return _CONVERTERS[rule_name](state_dict).opt_params


def recognised(state_dict: Mapping[str, Any]) -> Found | None:
    """The rule whose network has arrays of these names, or None.

    Raises:
        ValueError: as `from_pylo`; for arrays of several rules, or of one half of VeLO.
    """
    networks = [n for n, marks in _MARKS.items() if any(k.startswith(marks) for k in state_dict)]
    rules = [r for r, parts in _RULES.items() if set(parts) & set(networks)]
    if not rules:
        return None
    if len(rules) > 1:
        raise ValueError(f"the arrays are of several networks: {', '.join(networks)}; give one")
    missing = [n for n in _RULES[rules[0]] if n not in networks]
    if missing:
        raise ValueError(
            f"the arrays are of {networks[0]}, and VeLO needs {missing[0]} too: give the files of "
            "both, load((one, other)), or a folder that holds both"
        )
    return _CONVERTERS[rules[0]](state_dict)


# -- one function a rule -----------------------------------------------------------------------


def _adafactor_mlp(arrays: Mapping[str, Any]) -> Found:
    first = _shape("MetaMLP", arrays, "network.input.weight", 2)
    width = first[0]
    count = len({k for k in arrays if k.startswith("network.linear_") and k.endswith(".weight")})
    layers = ["input", *(f"linear_{i}" for i in range(count)), "output"]
    sizes = [_INPUTS, *[width] * (count + 1), 2]
    want: dict[str, tuple[int, ...]] = {}
    for i, name in enumerate(layers):
        want[f"network.{name}.weight"] = (sizes[i + 1], sizes[i])
        want[f"network.{name}.bias"] = (sizes[i + 1],)
    decays = {k: (len(v),) for k, v in _DECAYS.items()}
    found = _checked("MetaMLP", arrays, want, optional=decays)
    params = {}
    for i, name in enumerate(layers):
        params[f"w{i}"] = _matrix(found[f"network.{name}.weight"])
        params[f"b{i}"] = found[f"network.{name}.bias"]
    for name, values in _DECAYS.items():
        params[name] = found.get(name, torch.tensor(values))
    arguments = {"hidden_size": width, "hidden_layers": count + 1, "step_mult": _STEP_MULT}
    return Found("adafactor_mlp", arguments, params)


def _normalized_mlp(arrays: Mapping[str, Any]) -> Found:
    params = from_celo2(arrays)  # checks names and shapes
    for name, x in arrays.items():
        _weights("CELO2MLP", name, x)
    return Found("normalized_mlp", {}, params)


def _velo(arrays: Mapping[str, Any]) -> Found:
    hidden = _shape("VeLORNN", arrays, "lstm.linear.weight", 2)[0] // 4
    banks, units, _ = _shape("VeLOMLP", arrays, "input_weights_", 3)
    shapes = {
        "mix": (hidden, 30),
        "in": (hidden, 30),
        "lstm": (4 * hidden, 2 * hidden),
        "control": (banks, hidden),
        "rate": (1, hidden),
    }
    want: dict[str, tuple[int, ...]] = {}
    for ours, theirs in _LINEAR.items():
        want[f"{theirs}.weight"], want[f"{theirs}.bias"] = shapes[ours], shapes[ours][:1]
    want |= dict.fromkeys(_STARTS.values(), (1, hidden))
    count = len({k for k in arrays if k.startswith("hidden_weights_.")})
    layers = [("input", ""), *(("hidden", f".{i}") for i in range(count)), ("output", "")]
    sizes = [30, *[units] * (count + 1), 3]
    # Never read by the rule, but in PyLO's files: a layer of the network that is not used, and the
    # memory for the mixed weights.
    unread: dict[str, tuple[int, ...]] = {
        "mix_layer1.weight": (hidden, 30),
        "mix_layer1.bias": (hidden,),
    }
    for i, (kind, at) in enumerate(layers):
        for name, shape in (("weights", (sizes[i + 1], sizes[i])), ("bias", (sizes[i + 1],))):
            want[f"{kind}_{name}_{at}"] = (banks, *shape)
            unread[f"{kind}_{name}{at}"] = shape
    found = _checked("VeLORNN and VeLOMLP", arrays, want, optional=unread)
    rnn = {}
    for ours, theirs in _LINEAR.items():
        rnn[f"{ours}_w"] = _matrix(found[f"{theirs}.weight"])
        rnn[f"{ours}_b"] = found[f"{theirs}.bias"]
    rnn |= {ours: found[theirs].squeeze(0) for ours, theirs in _STARTS.items()}
    mlp = {}
    for i, (kind, at) in enumerate(layers):
        mlp[f"w{i}"], mlp[f"b{i}"] = (
            _matrix(found[f"{kind}_weights_{at}"]),
            found[f"{kind}_bias_{at}"],
        )
    arguments = {
        "lstm_hidden_size": hidden,
        "param_inits": banks,
        "hidden_size": units,
        "hidden_layers": count + 1,
    }
    return Found("velo", arguments, {"rnn": rnn, "mlp": mlp})


_CONVERTERS = {"adafactor_mlp": _adafactor_mlp, "normalized_mlp": _normalized_mlp, "velo": _velo}


# -- checks ------------------------------------------------------------------------------------


def _shape(network: str, arrays: Mapping[str, Any], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of the array that tells the sizes of a network."""
    if name not in arrays:
        raise ValueError(
            f"the array {name} of {network} is missing: there are {', '.join(arrays) or 'none'}"
        )
    shape = tuple(arrays[name].shape)
    if len(shape) != ndim:
        raise ValueError(
            f"the array {name} of {network} has shape {shape}: it must have {ndim} axes"
        )
    return shape


def _checked(
    network: str,
    arrays: Mapping[str, Any],
    want: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """Copies in float32, after a check of names and shapes."""
    for name in want:
        if name not in arrays:
            raise ValueError(
                f"the array {name} of {network} is missing: there must be {', '.join(want)}"
            )
    found = {}
    for name, x in arrays.items():
        shape = want.get(name, optional.get(name))
        if shape is None:
            raise ValueError(
                f"the array {name} is none of {network}: there must be {', '.join(want)}"
            )
        if tuple(x.shape) != shape:
            raise ValueError(
                f"the array {name} of {network} has shape {tuple(x.shape)}, expected {shape}"
            )
        found[name] = _weights(network, name, x)
    return found


def _weights(network: str, name: str, value: Any) -> Tensor:
    """A copy in float32 of an array of finite floating numbers."""
    x = torch.as_tensor(value).detach()
    if not x.is_floating_point():
        raise ValueError(f"the array {name} of {network} is {x.dtype}: weights are floating")
    return check_finite(x.to(torch.float32, copy=True), f"the array {name} of {network}")


def _matrix(weight: Tensor) -> Tensor:
    """``(*, in, out)`` from torch's ``(*, out, in)``."""
    return weight.mT.contiguous()
