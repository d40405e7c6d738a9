"""PyLO's networks are read from files, folders and by name, and fit a rule or are refused."""

import json
import re
import sys
import types

import pytest
import safetensors.torch
import torch

from fmeta import optimizers, pretrained, trees
from fmeta.random import fold_in

H, P = 6, 5


def drawn(shapes, seed=0):
    generator = fold_in(21, seed)
    return {k: 0.3 * torch.randn(s, generator=generator) for k, s in shapes.items()}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


META = drawn(
    {
        **linear("network.input", 39, 7),
        **linear("network.linear_0", 7, 7),
        **linear("network.linear_1", 7, 7),
        **linear("network.output", 7, 2),
    }
)
WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
CELO2 = drawn(
    {
        **{f"w0.{i}": (n, 8) for i, n in enumerate(WIDTHS)},
        **{"b0": (8,), "dense_w.0": (8, 8), "dense_b.0": (8,)},
        **{"dense_w.1": (8, 3), "dense_b.1": (3,)},
    }
)
VELO_RNN = drawn(
    {
        **linear("mix_layer1", 30, H),
        **linear("mix_layer2", 30, H),
        **linear("final_mix_layer", 30, H),
        **linear("lstm.linear", 2 * H, 4 * H),
        **linear("rnn_to_controls", H, P),
        **linear("step_size", H, 1),
        **{"lstm_init_state.0": (1, H), "lstm_init_state.1": (1, H)},
    }
)
BANKS = {
    "input_weights_": (P, 4, 30),
    "input_bias_": (P, 4),
    "hidden_weights_.0": (P, 4, 4),
    "hidden_bias_.0": (P, 4),
    "output_weights_": (P, 3, 4),
    "output_bias_": (P, 3),
}
# PyLO's module also holds the last tensor's own network, under the names without "_".
VELO_MLP = drawn({**BANKS, **{k.replace("_.", ".").rstrip("_"): s[1:] for k, s in BANKS.items()}})
VELO = {**VELO_RNN, **VELO_MLP}
NETWORKS = {"adafactor_mlp": META, "normalized_mlp": CELO2, "velo": VELO}
RULES = [name for name in NETWORKS if name in optimizers.BUILDERS]


def folder(path, arrays, **config):
    """A folder as huggingface_hub writes it."""
    path.mkdir(parents=True)
    safetensors.torch.save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def assert_same(got, want):
    assert trees.paths(got) == trees.paths(want)
    for a, b in zip(trees.leaves(got), trees.leaves(want), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


# -- weights -----------------------------------------------------------------------------------


def test_the_networks_layers_are_the_rules_layers():
    """Both networks give the same numbers, PyLO's computed by torch from its own names."""
    th = pretrained.from_pylo("adafactor_mlp", META)
    x = torch.randn(5, 39, generator=fold_in(22))
    want, got = x, x
    for i, name in enumerate(("input", "linear_0", "linear_1", "output")):
        weight, bias = META[f"network.{name}.weight"], META[f"network.{name}.bias"]
        want = torch.nn.functional.linear(want.relu() if i else want, weight, bias)
        got = (got.relu() if i else got) @ th[f"w{i}"] + th[f"b{i}"]
    torch.testing.assert_close(got, want)
    assert {k: tuple(x.shape) for k, x in th.items() if "decays" in k} == {
        "momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,),
    }  # fmt: skip
    given = torch.tensor([0.5, 0.25, 0.0])
    th = pretrained.from_pylo("adafactor_mlp", {**META, "momentum_decays": given})
    assert torch.equal(th["momentum_decays"], given)


def test_velos_banks_and_recurrent_network_keep_their_numbers():
    th = pretrained.from_pylo("velo", {k: x.numpy() for k, x in VELO.items()})
    assert torch.equal(th["mlp"]["w0"], VELO["input_weights_"].mT)
    assert torch.equal(th["mlp"]["b1"], VELO["hidden_bias_.0"])
    assert torch.equal(th["rnn"]["lstm_w"], VELO["lstm.linear.weight"].T)
    assert torch.equal(th["rnn"]["mix_w"], VELO["mix_layer2.weight"].T)
    assert torch.equal(th["rnn"]["h0"], VELO["lstm_init_state.0"][0])
    read = {*BANKS, *(k for k in VELO_RNN if "mix_layer1" not in k)}
    assert_same(pretrained.from_pylo("velo", {k: VELO[k] for k in read}), th)


def test_the_weights_are_copies_in_float32():
    arrays = {k: x.double() for k, x in VELO.items()}
    assert_same(pretrained.from_pylo("velo", arrays), pretrained.from_pylo("velo", VELO))
    th = pretrained.from_pylo("velo", VELO)
    th["rnn"]["rate_b"].zero_()
    assert VELO["step_size.bias"].item() != 0


# -- where they are read from ------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin"])
def test_a_file_gives_the_rule_and_its_weights(tmp_path, rule, suffix):
    path = tmp_path / f"network.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(NETWORKS[rule], path)
    else:
        torch.save(NETWORKS[rule], path)
    optimizer, th = pretrained.load(path)
    assert_same(th, pretrained.from_pylo(rule, NETWORKS[rule]))
    params = {"w": torch.randn(3, 4, generator=fold_in(23)), "b": torch.ones(3)}
    hidden = optimizer.init_hidden(th, params, num_steps=5)
    new, _ = optimizer.step(th, params, params, hidden, loss=torch.tensor(1.0))
    assert all(torch.isfinite(x).all() for x in new.values())
    # Saved as fmeta's own it comes back.
    pretrained.save(tmp_path / "own.safetensors", rule, th, **sizes(rule))
    assert_same(pretrained.load(tmp_path / "own.safetensors")[1], th)


def sizes(rule):
    return {
        "adafactor_mlp": {"hidden_size": 7, "hidden_layers": 3},
        "velo": {"lstm_hidden_size": H, "param_inits": P},
    }.get(rule, {})


@pytest.mark.parametrize("rule", RULES)
def test_a_folder_gives_the_same(tmp_path, rule):
    path = folder(tmp_path / "weights", NETWORKS[rule], activation="relu", mix_layers=True)
    torch.save({"other": torch.ones(1)}, path / "pytorch_model.bin")  # safetensors come first
    assert_same(pretrained.load(path)[1], pretrained.from_pylo(rule, NETWORKS[rule]))
    assert_same(pretrained.load(str(path))[1], pretrained.from_pylo(rule, NETWORKS[rule]))


def test_velo_is_read_from_two_places(tmp_path):
    rnn = folder(tmp_path / "both" / "VeLO_RNN", VELO_RNN)
    mlp = folder(tmp_path / "both" / "VeLO_MLP", VELO_MLP)
    want = pretrained.from_pylo("velo", VELO)
    for source in ((rnn, mlp), [mlp / "model.safetensors", str(rnn)], tmp_path / "both"):
        assert_same(pretrained.load(source)[1], want)
    flat = tmp_path / "flat"
    flat.mkdir()
    torch.save(VELO_RNN, flat / "rnn.pt")
    torch.save(VELO_MLP, flat / "mlp.pt")
    assert_same(pretrained.load(flat)[1], want)


def test_arguments_override(tmp_path):
    path = folder(tmp_path / "velo", VELO)
    params = {"w": torch.ones(2, 3)}
    delta = []
    for arguments in ({}, {"lr": 0.5}):
        rule, th = pretrained.load(path, **arguments)
        h = rule.init_hidden(th, params, num_steps=3)
        delta.append(rule.update(th, params, params, h, loss=torch.tensor(1.0))[0]["w"])
    torch.testing.assert_close(delta[1], 0.5 * delta[0])
    with pytest.raises(ValueError, match=r"give velo an array mlp/.*leave out the sizes"):
        pretrained.load(path, hidden_size=5)
    with pytest.raises(ValueError, match=r"rule 'velo' cannot be built with .*rate"):
        pretrained.load(path, rate=1.0)


# -- names on the hub --------------------------------------------------------------------------


def hub(monkeypatch, fetch):
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = fetch
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_name_is_fetched_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append(name)
        assert "*.safetensors" in allow_patterns
        return str(tmp_path / name)

    hub(monkeypatch, fetch)
    folder(tmp_path / "someone/celo2", CELO2)
    folder(tmp_path / "someone/VeLO_RNN", VELO_RNN)
    folder(tmp_path / "someone/VeLO_MLP", VELO_MLP)
    want = pretrained.from_pylo("normalized_mlp", CELO2)
    assert_same(pretrained.load("someone/celo2")[1], want)
    th = pretrained.load(("someone/VeLO_RNN", "someone/VeLO_MLP"))[1]
    assert_same(th, pretrained.from_pylo("velo", VELO))
    assert asked == ["someone/celo2", "someone/VeLO_RNN", "someone/VeLO_MLP"]


def test_an_existing_path_is_no_name(tmp_path, monkeypatch):
    hub(monkeypatch, lambda *args, **more: pytest.fail("the hub was asked"))
    folder(tmp_path / "someone/celo2", CELO2)
    monkeypatch.chdir(tmp_path)
    assert_same(pretrained.load("someone/celo2")[1], pretrained.from_pylo("normalized_mlp", CELO2))
    for missing in ("someone/w.safetensors", "./celo2", "/someone/celo2", "a/b/c", "celo2"):
        with pytest.raises(FileNotFoundError, match=f"no file {re.escape(missing)}"):
            pretrained.load(missing)


def test_without_the_hubs_client_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fmeta\[hub\]'.*give the path"):
        pretrained.load("someone/celo2")


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def fetch(name, allow_patterns):
        raise ConnectionError("no route")

    hub(monkeypatch, fetch)
    words = r"no path someone/celo2.*ConnectionError: no route.*check the name and the network"
    with pytest.raises(OSError, match=words):
        pretrained.load("someone/celo2")


# -- what does not fit -------------------------------------------------------------------------


def without(arrays, name):
    return {k: x for k, x in arrays.items() if k != name}


@pytest.mark.parametrize(
    ("rule", "arrays", "words"),
    [
        ("lstm", META, "no weights for the rule 'lstm': there are those of adafactor_mlp"),
        (
            "adafactor_mlp",
            without(META, "network.input.weight"),
            r"array network\.input\.weight of MetaMLP is missing",
        ),
        (
            "adafactor_mlp",
            without(META, "network.linear_1.bias"),
            r"array network\.linear_1\.bias of MetaMLP is missing",
        ),
        (
            "adafactor_mlp",
            {**META, "network.gain": META["network.input.bias"]},
            r"array network\.gain is none of MetaMLP",
        ),
        (
            "adafactor_mlp",
            {**META, "network.output.weight": torch.ones(3, 7)},
            r"network\.output\.weight of MetaMLP has shape \(3, 7\), expected \(2, 7\)",
        ),
        (
            "adafactor_mlp",
            {**META, "network.input.weight": torch.ones(7)},
            r"network\.input\.weight of MetaMLP has shape \(7,\): it must have 2 axes",
        ),
        ("normalized_mlp", without(CELO2, "w0.3"), r"array w0\.3 is missing"),
        ("velo", VELO_MLP, r"array lstm\.linear\.weight of VeLORNN is missing"),
        ("velo", without(VELO, "output_bias_"), r"array output_bias_ of .*VeLOMLP is missing"),
        (
            "velo",
            {**VELO, "rnn_to_controls.bias": torch.ones(P + 1)},
            rf"rnn_to_controls\.bias of VeLORNN.* has shape \({P + 1},\), expected \({P},\)",
        ),
        (
            "velo",
            {**VELO, "hidden_weights_.0": torch.ones(P, 4, 5)},
            rf"hidden_weights_\.0 of .* has shape \({P}, 4, 5\), expected \({P}, 4, 4\)",
        ),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_named(rule, arrays, words):
    with pytest.raises(ValueError, match=words):
        pretrained.from_pylo(rule, arrays)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (VELO_RNN, r"of VeLORNN, and VeLO needs VeLOMLP too: .*load\(\(one, other\)\)"),
        (VELO_MLP, "of VeLOMLP, and VeLO needs VeLORNN too"),
        ({**META, **CELO2}, "of several networks: MetaMLP, CELO2MLP; give one"),
        (without(CELO2, "b0"), "array b0 is missing"),
        ({"weight": torch.ones(1)}, r"none of PyLO's networks: its arrays are weight"),
    ],
    ids=["one half", "other half", "two networks", "a missing array", "another network"],
)
def test_the_error_names_the_file(tmp_path, arrays, words):
    safetensors.torch.save_file(arrays, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)w\.safetensors.*{words}"):
        pretrained.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": META, "step": 3}, "w.pt holds no state dict .* but state_dict, step"),
        ([torch.ones(1)], "w.pt holds no state dict .* but list"),
        (types.SimpleNamespace(a=1), "w.pt is no file of tensors .*a pickle can run code"),
    ],
    ids=["nested", "a list", "an object"],
)
def test_a_pickle_with_more_than_tensors_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"(?s){words}"):
        pretrained.load(tmp_path / "w.pt")


def test_a_damaged_pickle_is_named(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"w\.pt is no file of tensors"):
        pretrained.load(tmp_path / "w.pt")


def test_folders_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        pretrained.load(tmp_path)
    safetensors.torch.save_file(META, tmp_path / "a.safetensors")
    safetensors.torch.save_file(META, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors and .*b\.safetensors both hold"):
        pretrained.load(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    for name in "ab":
        rule = optimizers.linear()
        pretrained.save(own / f"{name}.safetensors", "linear", rule.init())
    with pytest.raises(ValueError, match="several files with weights"):
        pretrained.load(own)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"activation": "tanh"}, "a network with activation 'tanh', but fmeta's rule has 'relu'"),
        ({"mix_layers": False}, "a network with mix_layers False, but fmeta's rule has True"),
    ],
    ids=str,
)
def test_a_configuration_of_another_network_is_refused(tmp_path, config, words):
    path = folder(tmp_path / "w", CELO2, **config)
    with pytest.raises(ValueError, match=rf"config\.json is of {words}"):
        pretrained.load(path)
