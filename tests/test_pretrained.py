"""Weight files say which rule they are for, and fit it or are refused."""

import json
import os

import pytest
import torch

from fmeta import _files, optimizers, pretrained, trees
from fmeta.random import fold_in
from fmeta.testing import activations_beside

LEARNED = [
    name
    for name, builder in optimizers.BUILDERS.items()
    if name not in ("per_parameter_sgd", "meta_curvature") and trees.leaves(builder().init())
]
PARAMS = {"w": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.ones(3)}


def trained(name, **arguments):
    """Weights unlike those that `init` gives without a generator."""
    return optimizers.get(name)(**arguments).init(fold_in(5))


def test_there_are_rules_to_save():
    assert {"linear", "lstm", "normalized_mlp"} <= set(LEARNED)


@pytest.mark.parametrize("name", LEARNED)
def test_a_rule_comes_back_with_its_weights(tmp_path, name):
    weights = trees.map(lambda x: x + 0.125, trained(name))
    pretrained.save(tmp_path / "w.safetensors", name, weights)
    rule, got = pretrained.load(tmp_path / "w.safetensors")
    assert trees.paths(got) == trees.paths(weights)
    for a, b in zip(trees.leaves(got), trees.leaves(weights), strict=True):
        assert torch.equal(a, b)
    original = optimizers.get(name)()
    new, want = (
        o.step(
            th,
            PARAMS,
            PARAMS,
            o.init_hidden(th, PARAMS, num_steps=3),
            loss=torch.tensor(0.7),
            extras=activations_beside(PARAMS),
        )[0]
        for o, th in ((rule, got), (original, weights))
    )
    assert all(torch.equal(new[k], want[k]) for k in PARAMS)


def test_the_builders_arguments_are_saved_and_can_be_overridden(tmp_path):
    path = tmp_path / "w.safetensors"
    weights = trained("lstm", hidden_size=3, num_layers=1)
    pretrained.save(path, "lstm", weights, hidden_size=3, num_layers=1, output_scale=0.5)
    delta = {}
    for scale in (0.5, 1.0):
        rule, th = pretrained.load(path, **({} if scale == 0.5 else {"output_scale": scale}))
        delta[scale] = rule.update(th, PARAMS, PARAMS, rule.init_hidden(th, PARAMS))[0]["w"]
    torch.testing.assert_close(delta[1.0], 2 * delta[0.5])


def test_weights_of_another_dtype_come_back_too(tmp_path):
    path = tmp_path / "w.safetensors"
    weights = trees.cast(trained("linear"), torch.float64)
    pretrained.save(path, "linear", weights)
    got = pretrained.load(path)[1]
    assert torch.equal(got["weight"], weights["weight"])


def test_an_override_that_changes_the_weights_shape_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    pretrained.save(path, "lstm", trained("lstm", hidden_size=3), hidden_size=3)
    with pytest.raises(ValueError, match=r"array layers\.0\..* expected"):
        pretrained.load(path, hidden_size=4)


@pytest.mark.parametrize(
    ("name", "weights", "arguments", "words"),
    [
        ("lnear", {}, {}, "unknown optimizer 'lnear': did you mean linear"),
        ("linear", {"weight": torch.ones(2)}, {}, r"opt_params of linear at path weight has shape"),
        ("linear", {"w": torch.ones(1, 2)}, {}, "opt_params of linear .*path weight is missing"),
        ("linear", {"weight": None}, {}, "opt_params of linear at path weight is None"),
        (
            "linear",
            {"weight": torch.ones(1, 2)},
            {"rate": 1},
            "rule 'linear' cannot be built with .*rate",
        ),
        (
            "linear",
            {"weight": torch.ones(1, 2)},
            {"lr": torch.tensor(0.5)},
            "builder arguments must be plain values",
        ),
    ],
)
def test_what_does_not_fit_is_not_saved(tmp_path, name, weights, arguments, words):
    with pytest.raises(ValueError, match=words):
        pretrained.save(tmp_path / "w.safetensors", name, weights, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*w\.safetensors"):
        pretrained.load(tmp_path / "w.safetensors")


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    pretrained.save(path, "lstm", trained("lstm"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"w\.safetensors is not a whole safetensors file"):
        pretrained.load(path)


def header(**entries):
    return {"fmeta": json.dumps({"format": 1, "rule": "linear", "arguments": {}, **entries})}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_programs_file_is_named(tmp_path, metadata):
    path = tmp_path / "w.safetensors"
    _files.save_tree(path, trained("linear"), metadata)
    with pytest.raises(
        ValueError, match=r"w\.safetensors was not written by fmeta\.pretrained\.save"
    ):
        pretrained.load(path)


@pytest.mark.parametrize(
    "metadata",
    [{"fmeta": "{"}, {"fmeta": "{}"}, {"fmeta": "[]"}, header(arguments=[]), header(rule=None)],
    ids=str,
)
def test_a_damaged_header_is_named(tmp_path, metadata):
    path = tmp_path / "w.safetensors"
    _files.save_tree(path, trained("linear"), metadata)
    with pytest.raises(ValueError, match=r"w\.safetensors has a header that is damaged"):
        pretrained.load(path)


def test_weights_that_are_not_as_they_were_written_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    pretrained.save(path, "linear", trained("linear"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its bytes are not those") as error:
        pretrained.load(path)
    assert str(path) in str(error.value)


def test_a_format_of_the_future_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    _files.save_tree(path, trained("linear"), header(format=2))
    with pytest.raises(ValueError, match="has format 2, but this version reads 1"):
        pretrained.load(path)


def test_a_file_of_a_rule_that_is_not_known_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    _files.save_tree(path, {}, header(rule="adan"))
    with pytest.raises(ValueError, match="unknown optimizer 'adan': did you mean adam"):
        pretrained.load(path)


def test_equal_weights_give_equal_files(tmp_path):
    for name in ("a", "b"):
        pretrained.save(tmp_path / name, "lstm", trained("lstm"), num_layers=2, hidden_size=20)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failing_write_leaves_the_old_weights(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    pretrained.save(path, "linear", trained("linear"))

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        pretrained.save(path, "lstm", trained("lstm"))
    assert pretrained.load(path)[1]["weight"].shape == (1, 2)
    assert len(list(tmp_path.iterdir())) == 1
