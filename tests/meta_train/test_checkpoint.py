"""A checkpoint that is not this run's is refused, by name, with the cure, and left as it is."""

import json
import os

import pytest
import safetensors.torch
import torch

import fmeta
from fmeta.estimators import Estimator
from fmeta.meta_train import resume, run

W = {"w": torch.tensor([3.0, 1.0])}
OPTIONS = {"outer": fmeta.optimizers.sgd(0.1), "num_steps": 3}
ABOUT = {"rule": "linear", "widths": (8, 8)}


@pytest.fixture
def saved(noisy, tmp_path):
    run(noisy(), W, checkpoint_folder=tmp_path, about=ABOUT, **OPTIONS)
    return tmp_path / "state.safetensors"


def refused(path, noisy, words, *, estimator=None, params=W, **options):
    before = path.read_bytes()
    arguments = {**OPTIONS, "about": ABOUT, **options}
    with pytest.raises(ValueError, match=words) as error:
        resume(path.parent, estimator or noisy(), params, **arguments)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_nothing_else_is_in_the_folder(saved):
    assert os.listdir(saved.parent) == [saved.name]


def test_it_is_read_without_this_program(saved):
    arrays = safetensors.torch.load_file(saved)
    assert arrays["meta_params/w"].shape == (2,)
    with safetensors.safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["fmeta.meta_train"])
    assert header["numbers"]["step"] == 3
    assert header["about"] == {"rule": "linear", "widths": [8, 8]}


def test_a_missing_one_is_named_and_no_folder_made(noisy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none/state.*start with run"):
        resume(tmp_path / "none", noisy(), W, **OPTIONS)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"PK\x03\x04" * 100, "half"], ids=repr)
def test_a_truncated_or_foreign_file(saved, noisy, content):
    half = saved.read_bytes()[: saved.stat().st_size // 2]
    saved.write_bytes(half if content == "half" else content)
    refused(saved, noisy, "is not a whole safetensors file.*put back a copy of it, or delete it")


@pytest.mark.parametrize("at", [-1, -9, 0.5])
def test_a_byte_that_is_not_as_it_was_written(saved, noisy, at):
    data = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")  # arrays begin here
    data[at if at < 0 else header + int(at * (len(data) - header))] ^= 0x10
    saved.write_bytes(data)
    refused(saved, noisy, "is damaged: its bytes are not those that were written; put back a copy")


@pytest.mark.parametrize("before", ['"step": 3', '"linear"'])
def test_a_number_or_name_that_is_not_as_it_was_written(saved, noisy, before):
    after = before.replace("3", "2").replace("linear", "lineal")
    data = saved.read_bytes()
    escaped = [x.replace('"', '\\"').encode() for x in (before, after)]
    assert data.count(escaped[0]) == 1
    saved.write_bytes(data.replace(*escaped))
    refused(saved, noisy, "is damaged: its bytes are not those that were written; put back a copy")


def test_one_without_a_checksum_is_read(saved, noisy):
    """As versions wrote them that knew none."""
    with safetensors.safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["fmeta.meta_train"])
    del header["checksum"]
    arrays = safetensors.torch.load(saved.read_bytes())
    want = arrays["meta_params/w"].clone()
    safetensors.torch.save_file(arrays, saved, {"fmeta.meta_train": json.dumps(header)})
    found = resume(saved.parent, noisy(), W, about=ABOUT, **OPTIONS)
    assert torch.equal(found.meta_params["w"], want)


def test_arrays_of_another_program(saved, noisy):
    safetensors.torch.save_file({"layer.weight": torch.ones(2)}, saved, {"format": "pt"})
    refused(saved, noisy, r"is no checkpoint of fmeta\.meta_train: give the folder of one")


def test_another_version(saved, noisy):
    arrays = safetensors.torch.load_file(saved)
    safetensors.torch.save_file(arrays, saved, {"fmeta.meta_train": json.dumps({"format": 99})})
    refused(saved, noisy, "has format 99, but this version reads 1")


@pytest.mark.parametrize("header", ["{", "[]", "{}", '{"format": 1}'])
def test_a_damaged_header(saved, noisy, header):
    arrays = safetensors.torch.load_file(saved)
    safetensors.torch.save_file(arrays, saved, {"fmeta.meta_train": header})
    refused(saved, noisy, "has a header that is damaged")


def test_another_configuration_is_named(saved, noisy):
    words = "is of a run with rule 'linear', not 'lstm': resume with the same"
    refused(saved, noisy, words, about={**ABOUT, "rule": "lstm"})


def test_another_seed(saved, noisy):
    refused(saved, noisy, "is of a run with seed 0, not 1: resume with its seed", seed=1)


def test_another_shape(saved, noisy):
    words = r"array \S+/w has shape \(2,\).* expected \(3,\)"
    refused(saved, noisy, words, params={"w": torch.zeros(3)})


def test_another_outer_optimizer(saved, noisy):
    refused(saved, noisy, "does not hold the expected arrays", outer=fmeta.optimizers.adam())


def test_another_estimator(saved, noisy):
    other = Estimator(lambda m, seed: {**noisy().init(m, seed), "epoch": 0}, noisy().estimate)
    refused(saved, noisy, "lacks .*epoch.* of another estimator or optimizer", estimator=other)


def test_averaging_or_not_is_another_run(saved, noisy):
    refused(saved, noisy, "does not hold the expected arrays: missing .*average", averaging=0.5)


def test_a_new_run_does_not_overwrite_it(saved, noisy):
    before = saved.read_bytes()
    with pytest.raises(FileExistsError, match=r"is the checkpoint of another run.*resume"):
        run(noisy(), W, checkpoint_folder=saved.parent, **OPTIONS)
    assert saved.read_bytes() == before
