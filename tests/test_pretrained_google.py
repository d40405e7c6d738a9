"""Weights of google/learned_optimization: all forms of their names; errors that name an array."""

import re
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

import fmeta
from fmeta import optimizers, pretrained, trees

FOLDER = Path(__file__).parent / "reference"
LSTMState = namedtuple("LSTMState", ["hidden", "cell"])


def noise(*shape, key=0):
    return np.random.default_rng([key, *shape]).normal(size=shape).astype(np.float32)


def drawn(shapes):
    return {name: noise(*shape, key=i) for i, (name, shape) in enumerate(shapes.items())}


def adafactor_mlp(hidden=4, layers=2, inputs=39, decays=(3, 1, 3)):
    sizes = [inputs, *[hidden] * layers, 2]
    found = {}
    for i in range(layers + 1):
        found[f"w{i}"], found[f"b{i}"] = (sizes[i], sizes[i + 1]), (sizes[i + 1],)
    names = ("momentum_decays", "rms_decays", "adafactor_decays")
    return drawn({**found, **{k: (n,) for k, n in zip(names, decays, strict=True)}})


def mlp(hidden=32, layers=2):
    found = adafactor_mlp(hidden, layers, 19)
    return {k: x for k, x in found.items() if "decays" not in k}


def linear(name, inputs, outputs):
    return {f"{name}/w": (inputs, outputs), f"{name}/b": (outputs,)}


def rnn_mlp(h=64, hidden=32, layers=2, said=16, told=18, to=17):
    shapes = {"initial_from_lstm": (told,), "initial_from_mlp": (said,)}
    shapes |= {"lstm_init_h": (1, h), "lstm_init_c": (1, h)}
    shapes |= linear("rnn_params/rnn.linear", 18 + told + said + h, 4 * h)
    shapes |= linear("rnn_to_ff_params/rnn_to_ff", h, to)
    shapes |= linear("rnn_to_in_params/rnn_to_in", h, told)
    sizes = [37 + to, *[hidden] * layers, 2 + said]
    for i in range(layers + 1):
        shapes |= linear(f"ffmod_params/mlp.linear_{i}", sizes[i], sizes[i + 1])
    return drawn(shapes)


def nn_adam(h=32):
    shapes = {"lstm_init_h": (1, h), "lstm_init_c": (1, h)}
    shapes |= linear("rnn_params/rnn.linear", 19 + h, 4 * h)
    shapes |= linear("rnn_to_controls_params/rnn_to_controls", h, 4)
    return drawn({**shapes, **{f"per_layer_{k}": () for k in ("lr", "beta1", "beta2", "epsilon")}})


WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)


def velo(h=128, banks=64, units=4):
    shapes = {"lstm_init_h": (1, h), "lstm_init_c": (1, h)}
    for name in ("linear", "linear_1", "linear_2"):
        shapes |= linear(f"rnn_params/{name}", 30, h)
    shapes |= linear("rnn_params/rnn/linear", 2 * h, 4 * h)
    shapes |= linear("rnn_params/rnn_to_controls", h, banks)
    shapes |= linear("rnn_params/step_size", h, 1)
    shapes |= {f"ff_mod_stack/w0__{i}": (banks, n, units) for i, n in enumerate(WIDTHS)}
    shapes |= {"ff_mod_stack/b0": (banks, units), "ff_mod_stack/w1": (banks, units, units)}
    shapes |= {"ff_mod_stack/b1": (banks, units), "ff_mod_stack/w2": (banks, units, 3)}
    return drawn({**shapes, "ff_mod_stack/b2": (banks, 3)})


def adam():
    return drawn({k: () for k in ("log_lr", "one_minus_beta1", "one_minus_beta2", "log_epsilon")})


THETAS = {
    "mlp": mlp,
    "adafactor_mlp": adafactor_mlp,
    "rnn_mlp": rnn_mlp,
    "nn_adam": nn_adam,
    "velo": velo,
    "adam": adam,
    "sgdm": lambda: drawn({"log_lr": (), "one_minus_momentum": ()}),
    "sgd": lambda: drawn({"log_lr": ()}),
}
CLASSES = {
    "mlp": "MLPLOpt",
    "adafactor_mlp": "AdafacMLPLOpt",
    "rnn_mlp": "RNNMLPLOpt",
    "nn_adam": "NNAdam",
    "velo": "HyperV2",
    "adam": "LearnableAdam",
    "sgdm": "LearnableSGDM",
    "sgd": "LearnableSGD",
}
LEARNED = {
    "adam": lambda: fmeta.learn(
        optimizers.adam, {"lr": "log", "betas": "log1m", "eps": "log"}, eps_root=1e-8
    ),
    "sgdm": lambda: fmeta.learn(optimizers.sgd, {"lr": "log", "momentum": "log1m"}),
    "sgd": lambda: fmeta.learn(optimizers.sgd, {"lr": "log"}),
}
# Rules that this version has; the weights of all can be read.
RULES = {
    name: LEARNED[name] if name in LEARNED else optimizers.BUILDERS[name]
    for name in THETAS
    if name in LEARNED or name in optimizers.BUILDERS
}


def equal(a, b):
    assert trees.paths(a) == trees.paths(b)
    assert all(map(torch.equal, trees.leaves(a), trees.leaves(b)))


def shapes(tree):
    return dict(zip(trees.paths(tree), [x.shape for x in trees.leaves(tree)], strict=True))


@pytest.mark.parametrize("name", RULES)
def test_the_weights_are_structured_as_the_rules_own(name):
    want = RULES[name]().init()
    got = pretrained.from_google(name, THETAS[name]())
    assert shapes(got) == shapes(want)
    assert {x.dtype for x in trees.leaves(got)} == {torch.float32}


@pytest.mark.parametrize("name", THETAS)
def test_googles_class_is_another_name_of_the_rule(name):
    theta = THETAS[name]()
    equal(pretrained.from_google(CLASSES[name], theta), pretrained.from_google(name, theta))


@pytest.mark.parametrize("name", THETAS)
def test_each_array_is_used_once(name):
    theta = THETAS[name]()
    unused = {"rnn_params/linear/w", "rnn_params/linear/b"} if name == "velo" else set()
    want = sum(x.size for k, x in theta.items() if k not in unused)
    got = trees.leaves(pretrained.from_google(name, theta))
    assert sum(x.numel() for x in got) == want
    total = sum(np.float64(x).sum() for k, x in theta.items() if k not in unused)
    assert sum(x.double().sum().item() for x in got) == pytest.approx(total)


# -- forms of theta ------------------------------------------------------------------------------


def haiku(name, theta):
    """Nested as the library itself holds it: modules of Haiku in dicts, the state as a tuple."""
    new = {}
    for key, x in theta.items():
        if name == "mlp":
            new.setdefault(f"mlp/~/linear_{key[1]}", {})[key[0]] = x
        elif name == "adafactor_mlp" and "decays" not in key:
            new.setdefault("nn", {}).setdefault("~", {})[key] = x
        elif key.startswith("lstm_init"):
            pair = LSTMState(theta["lstm_init_h"], theta["lstm_init_c"])
            new["lstm_init_state"] = pair
        elif name == "velo" and key.startswith("ff_mod"):
            new.setdefault("ff_mod_stack", {}).setdefault("~", {})[key.split("/")[1]] = x
        elif "_params/" in key:
            top, rest = key.split("/", 1)
            module, part = rest.rsplit("/", 1)
            module = module.replace("mlp.linear", "mlp/~/linear").replace(".", "/")
            new.setdefault(top, {}).setdefault(module, {})[part] = x
        else:
            new[key] = x
    return new


def flat(tree, prefix=""):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = {}
    for k, x in items:
        path = f"{prefix}/{k}" if prefix else str(k)
        found |= flat(x, path) if isinstance(x, (dict, tuple)) else {path: x}
    return found


@pytest.mark.parametrize("form", ["nested", "nested, with pairs", "flat"])
@pytest.mark.parametrize("name", THETAS)
def test_names_as_haiku_makes_them(name, form):
    theta = haiku(name, THETAS[name]())
    if form == "nested, with pairs" and "lstm_init_state" in theta:
        theta["lstm_init_state"] = tuple(theta["lstm_init_state"])
    if form == "flat":
        theta = flat(theta)
        assert not any(isinstance(x, (dict, tuple)) for x in theta.values())
    equal(pretrained.from_google(name, theta), pretrained.from_google(name, THETAS[name]()))


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda x: torch.nn.Parameter(torch.from_numpy(x).double()),
        lambda x: np.asarray(x, dtype=np.float64),
        lambda x: x.tolist(),
    ],
    ids=["tensors", "parameters in float64", "arrays in float64", "lists"],
)
def test_any_kind_of_array(convert):
    want = pretrained.from_google("nn_adam", nn_adam(h=3))
    got = pretrained.from_google("nn_adam", {k: convert(x) for k, x in nn_adam(h=3).items()})
    equal(got, want)
    assert not any(x.requires_grad for x in trees.leaves(got))


def test_the_weights_are_copies():
    theta = {k: torch.from_numpy(x) for k, x in nn_adam(h=3).items()}
    got = pretrained.from_google("nn_adam", theta)
    want = trees.map(torch.clone, got)
    for x in theta.values():
        x.zero_()
    equal(got, want)


# -- what the arrays are -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theta", "arguments"),
    [
        ("mlp", mlp(8, 1), {"hidden_size": 8, "hidden_layers": 1}),
        (
            "adafactor_mlp",
            adafactor_mlp(8, 1, 33, (2, 2, 2)),
            {
                "hidden_size": 8,
                "hidden_layers": 1,
                "initial_momentum_decays": (0.9, 0.95),
                "initial_rms_decays": (0.9, 0.99),
                "initial_adafactor_decays": (0.8, 0.99),
            },
        ),
        (
            "rnn_mlp",
            rnn_mlp(5, 6, 3, 2, 4, 3),
            {
                "lstm_hidden_size": 5,
                "hidden_size": 6,
                "hidden_layer": 3,
                "from_mlp_size": 2,
                "from_lstm_size": 4,
                "lstm_to_ff": 3,
            },
        ),
        ("nn_adam", nn_adam(5), {"lstm_hidden_size": 5}),
        ("velo", velo(5, 3, 6), {"lstm_hidden_size": 5, "param_inits": 3, "hidden_size": 6}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sizes_are_those_of_the_arrays(name, theta, arguments):
    got = pretrained.from_google(name, theta)
    if name in optimizers.BUILDERS:
        assert shapes(got) == shapes(optimizers.BUILDERS[name](**arguments).init())
    else:
        assert shapes(got) == {k: torch.Size(x.shape) for k, x in theta.items()}


def test_velo_is_the_same_from_google_and_from_pylo():
    """PyLO's arrays by google's names: transposed, the banks of the first layer in groups."""
    data = np.load(FOLDER / "velo.npz")
    names = {
        "linear": "mix_layer1",
        "linear_1": "mix_layer2",
        "linear_2": "final_mix_layer",
        "rnn/linear": "lstm.linear",
        "rnn_to_controls": "rnn_to_controls",
        "step_size": "step_size",
    }
    theta = {"lstm_init_state": tuple(data[f"rnn/lstm_init_state.{i}"] for i in (0, 1))}
    for google, pylo in names.items():
        theta[f"rnn_params/{google}/w"] = data[f"rnn/{pylo}.weight"].T
        theta[f"rnn_params/{google}/b"] = data[f"rnn/{pylo}.bias"]
    parts = np.split(np.swapaxes(data["mlp/input_weights_"], 1, 2), np.cumsum(WIDTHS)[:-1], 1)
    theta |= {f"ff_mod_stack/w0__{i}": x for i, x in enumerate(parts)}
    theta["ff_mod_stack/b0"] = data["mlp/input_bias_"]
    for i, kind in ((1, "hidden_{}_.0"), (2, "output_{}_")):
        weights = data["mlp/" + kind.format("weights")]
        theta[f"ff_mod_stack/w{i}"] = np.swapaxes(weights, 1, 2)
        theta[f"ff_mod_stack/b{i}"] = data["mlp/" + kind.format("bias")]
    arrays = {k.split("/", 1)[1]: data[k] for k in data.files if k.startswith(("rnn/", "mlp/"))}
    equal(pretrained.from_google("velo", theta), pretrained.from_pylo("velo", arrays))


@pytest.mark.parametrize("name", LEARNED)
def test_learned_numbers_come_back(name):
    numbers = {"log_lr": 0.02, "log_epsilon": 1e-6}
    complements = {"one_minus_beta1": 0.8, "one_minus_beta2": 0.99, "one_minus_momentum": 0.7}
    theta = {k: np.log(x) for k, x in numbers.items() if k in THETAS[name]()}
    theta |= {k: np.log(1 - x) for k, x in complements.items() if k in THETAS[name]()}
    th, params = pretrained.from_google(name, theta), {"w": torch.linspace(-1, 1, 4)}
    by_hand = {
        "adam": lambda: optimizers.adam(0.02, (0.8, 0.99), 1e-6, eps_root=1e-8),
        "sgdm": lambda: optimizers.sgd(0.02, momentum=0.7),
        "sgd": lambda: optimizers.sgd(0.02),
    }[name]()
    ends = []
    for rule, weights in ((LEARNED[name](), th), (by_hand, {})):
        p, hidden = params, rule.init_hidden(weights, params)
        for _ in range(3):
            p, hidden = rule.step(weights, p, p, hidden)
        ends.append(p)
    torch.testing.assert_close(*ends)


def test_they_can_be_saved_as_fmetas(tmp_path):
    got = pretrained.from_google("rnn_mlp", rnn_mlp(h=8))
    pretrained.save(tmp_path / "w.safetensors", "rnn_mlp", got, lstm_hidden_size=8)
    equal(pretrained.load(tmp_path / "w.safetensors")[1], got)


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THETAS)
def test_each_missing_array_is_named(name):
    theta = THETAS[name]()
    for key in set(theta) - {"rnn_params/linear/w", "rnn_params/linear/b"}:  # velo does not use it
        rest = {k: x for k, x in theta.items() if k != key}
        words = f"array {key.replace('.', '/')} of {name} is missing: there are "
        with pytest.raises(ValueError, match=words):
            pretrained.from_google(name, rest)


@pytest.mark.parametrize("name", THETAS)
def test_each_wrong_shape_is_named(name):
    for key, x in THETAS[name]().items():
        theta = {**THETAS[name](), key: x[None]}
        words = re.escape(f"array {key} of {name} has shape {(1, *x.shape)}, expected (")
        with pytest.raises(ValueError, match=words):
            pretrained.from_google(name, theta)


@pytest.mark.parametrize("name", THETAS)
def test_a_superfluous_array_is_named(name):
    theta = {**THETAS[name](), "extra/w": np.zeros(3)}
    with pytest.raises(ValueError, match=f"the array extra/w is none of {name}: remove it"):
        pretrained.from_google(name, theta)


@pytest.mark.parametrize(
    ("name", "theta", "words"),
    [
        ("lstm", {}, r"no weights for the rule 'lstm': there are mlp \(MLPLOpt\), .*velo"),
        ("sgd", [1.0], "theta of sgd must be a dict of arrays, got a list"),
        ("sgd", {}, "array log_lr of sgd is missing: there are none"),
        ("sgd", {"log_lr": "fast"}, "log_lr of sgd is no array of real numbers, but a str"),
        ("sgd", {"log_lr": None}, "log_lr of sgd is no array of real numbers, but a NoneType"),
        ("sgd", {"log_lr": 1j}, "log_lr of sgd is no array of real numbers, but a complex"),
        ("sgd", {"log_lr": [[1.0], [1.0, 2.0]]}, "log_lr of sgd is no array of real numbers"),
        ("sgd", {"log_lr": 0.0, "~/log_lr": 0.0}, "log_lr and ~/log_lr, .* one array by two names"),
        ("sgd", {"log_lr": 0.0, "one_minus_momentum": 0.0}, "one_minus_momentum is none"),
        ("nn_adam", nn_adam(0), r"lstm_init_h of nn_adam has shape \(1, 0\), expected \(1, any\)"),
    ],
    ids=range(10),
)
def test_what_else_can_be_wrong(name, theta, words):
    with pytest.raises(ValueError, match=words):
        pretrained.from_google(name, theta)


def test_a_shape_is_said_with_what_was_wanted():
    theta = {**rnn_mlp(), "rnn_params/rnn.linear/w": np.zeros((115, 256))}
    words = r"rnn_params/rnn\.linear/w of rnn_mlp has shape \(115, 256\), expected \(116, 256\)"
    with pytest.raises(ValueError, match=words):
        pretrained.from_google("rnn_mlp", theta)


@pytest.mark.parametrize("name", ["w0", "b0", "w1", "b1", "w2"])
def test_of_arrays_that_do_not_go_together_the_odd_one_is_named(name):
    widths = {"w0": (19, 32), "b0": (32,), "w1": (32, 32), "b1": (32,), "w2": (32, 2), "b2": (2,)}
    theta = {key: np.zeros(shape) for key, shape in widths.items()}
    theta[name] = theta[name][..., :31] if name != "w2" else theta[name][:31]
    with pytest.raises(ValueError, match=f"the array {name} of mlp has shape .*, expected .*32"):
        pretrained.from_google("mlp", theta)
