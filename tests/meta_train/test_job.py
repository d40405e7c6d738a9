"""A job survives being stopped, killed or out of space anywhere: the rest gives the same bytes."""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fmeta
from fmeta import _files, pretrained
from fmeta.meta_train import Recipe, run_job
from fmeta.meta_train._lock import locked

RULE = fmeta.optimizers.linear(lr=0.5)
ALL = {i: 0 for i in range(4)}


@dataclasses.dataclass(frozen=True)
class Config:
    out: str
    name: str = "run"
    resume: bool = False
    num_steps: int = 7
    widths: tuple[int, ...] = (4, 2)


@pytest.fixture
def recipe(noisy):
    """``recipe(at)``: a recipe that calls ``at(phase)`` in each phase."""

    def build(at=lambda phase: None):
        def evaluate(result, folder, say):
            at("evaluation")
            say("drawing")
            _files.write_bytes(folder / "curves.png", b"figure")
            at("after the figure")
            return {"weight": result.meta_params["weight"].tolist(), "step": result.step}

        def validate(meta_params):
            at("validation")
            return meta_params["weight"].square().sum()

        def recipe(config):
            estimator = noisy({2: {1: 4}, 4: ALL}, before=lambda step: at(f"step {step}"))
            options = {
                "outer": fmeta.optimizers.adam(0.1),
                "num_steps": config.num_steps,
                "averaging": 0.5,
                "validate": validate,
                "validate_every": 3,
                "checkpoint_every": 2,
            }
            return Recipe("linear", {"lr": 0.5}, estimator, RULE.init(), options, evaluate)

        return recipe

    return build


@pytest.fixture
def whole(recipe, tmp_path):
    run_job(Config(str(tmp_path), "whole"), recipe())
    return contents(tmp_path / "whole")


def contents(folder):
    """Bytes by name, but for what differs from run to run: seconds, and where the run is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.endswith(".timing.jsonl"):
            found[name] = path.read_bytes()
    found["config.json"] = found["config.json"].replace(folder.name.encode(), b"NAME")
    return found


def go_on(recipe, tmp_path, name="cut"):
    """Resumes, or starts where nothing was begun."""
    resume = (tmp_path / name / "config.json").exists()
    return run_job(Config(str(tmp_path), name, resume), recipe())


def test_all_is_written_and_the_weights_can_be_shared(whole, tmp_path):
    assert whole.keys() == {
        "checkpoint/state.safetensors",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "results.json",
        "weights.safetensors",
    }
    _, weights = pretrained.load(tmp_path / "whole" / "weights.safetensors")
    assert weights["weight"].tolist() == json.loads(whole["results.json"])["weight"]
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config == {"out": str(tmp_path), "name": "whole", "num_steps": 7, "widths": [4, 2]}


PHASES = ["validation", "step 0", "step 3", "step 6", "evaluation", "after the figure"]


@pytest.mark.parametrize("phase", PHASES)
def test_stopped_in_any_phase_it_goes_on_from_there(recipe, whole, tmp_path, phase):
    seen = []

    def at(where):
        seen.append(where)
        if where == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(Config(str(tmp_path), "cut"), recipe(at))
    rest = []
    run_job(Config(str(tmp_path), "cut", True), recipe(rest.append))
    assert contents(tmp_path / "cut") == whole
    made = [where for where in seen if where.startswith("step") and where != phase]
    assert not set(made) & set(rest)  # no outer step is made twice


def test_stopped_again_while_it_saves(recipe, whole, tmp_path, monkeypatch):
    """The second Ctrl-C comes in the middle of the write that the first one asked for."""
    fsync = os.fsync

    def stop_again(file):
        monkeypatch.setattr(os, "fsync", fsync)
        raise KeyboardInterrupt

    def at(phase):
        if phase == "step 3":
            monkeypatch.setattr(os, "fsync", stop_again)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(Config(str(tmp_path), "cut"), recipe(at))
    go_on(recipe, tmp_path)
    assert contents(tmp_path / "cut") == whole


def counting(act):
    """Calls ``act`` with the numbers 0, 1, 2, ... before each operation that writes."""
    patch, calls = pytest.MonkeyPatch(), [0]
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)

        def operation(*args, real=real):
            act(calls[0])
            calls[0] += 1
            return real(*args)

        patch.setattr(os, name, operation)
    return patch, calls


def number_of_writes(recipe, tmp_path):
    patch, calls = counting(lambda n: None)
    try:
        run_job(Config(str(tmp_path), "counted"), recipe())
    finally:
        patch.undo()
    assert calls[0] > 20
    return calls[0]


def killed_at(recipe, tmp_path, n):
    """A process that goes on with the job and is killed at its n-th write; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            counting(lambda k: os.kill(os.getpid(), signal.SIGKILL) if k == n else None)
            go_on(recipe, tmp_path, f"cut{n}")
        finally:
            os._exit(0)  # not into the tests
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="POSIX")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_killed_at_any_write_twice_the_rest_gives_the_same_bytes(recipe, whole, tmp_path):
    for n in range(number_of_writes(recipe, tmp_path)):
        assert killed_at(recipe, tmp_path, n)
        killed_at(recipe, tmp_path, n)
        go_on(recipe, tmp_path, f"cut{n}")
        assert contents(tmp_path / f"cut{n}") == whole, n


def test_a_full_disk_at_any_write_is_a_sentence_and_loses_nothing(recipe, whole, tmp_path):
    def full(k, n):
        if k >= n:  # and stays full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for n in range(number_of_writes(recipe, tmp_path)):
        patch, _ = counting(lambda k, n=n: full(k, n))
        try:
            with pytest.raises(OSError, match=r"^cannot write .*cut.*: No space left"):
                run_job(Config(str(tmp_path), f"cut{n}"), recipe())
        finally:
            patch.undo()
        go_on(recipe, tmp_path, f"cut{n}")
        assert contents(tmp_path / f"cut{n}") == whole, n


def test_a_finished_run_is_not_run_again(recipe, whole, tmp_path):
    said, seen = [], []
    config = Config(str(tmp_path), "whole", resume=True)
    results = run_job(config, recipe(seen.append), on_phase=said.append)
    assert results == json.loads(whole["results.json"])
    assert seen == []
    assert "is finished" in said[0]
    assert contents(tmp_path / "whole") == whole


def test_a_folder_may_be_moved_and_resumed(recipe, whole, tmp_path):
    def at(phase):
        if phase == "step 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(Config(str(tmp_path), "cut"), recipe(at))
    (tmp_path / "cut").rename(tmp_path / "moved")
    go_on(recipe, tmp_path, "moved")
    got = contents(tmp_path / "moved")
    assert {**got, "config.json": 0} == {**whole, "config.json": 0}


def refused(error, words, config, recipe, folder):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(error, match=words):
        run_job(config, recipe())
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("left", ["config.json", "weights.safetensors", "results.json"])
def test_a_run_does_not_start_where_there_is_something_of_another(recipe, whole, tmp_path, left):
    for name in whole.keys() - {left, "checkpoint/state.safetensors"}:
        (tmp_path / "whole" / name).unlink()
    words = "holds a run already: choose another --name, delete it, or add --resume"
    refused(FileExistsError, words, Config(str(tmp_path), "whole"), recipe, tmp_path)


def test_resuming_with_other_settings(recipe, whole, tmp_path):
    config = Config(str(tmp_path), "whole", True, num_steps=8, widths=(1,))
    words = r"started with other settings \(num_steps, widths\): resume with the same"
    refused(ValueError, words, config, recipe, tmp_path)


def test_resuming_nothing_makes_no_folder(recipe, tmp_path):
    config = Config(str(tmp_path / "none"), resume=True)
    refused(FileNotFoundError, "there is no run to resume in .*none/run", config, recipe, tmp_path)
    assert not (tmp_path / "none").exists()


def test_the_checkpoint_of_another_run_is_not_taken_for_ones_own(recipe, whole, tmp_path):
    run_job(Config(str(tmp_path), "other", num_steps=3), recipe())
    for name in ("results.json", "weights.safetensors"):
        (tmp_path / "whole" / name).unlink()
    path = tmp_path / "whole" / "checkpoint" / "state.safetensors"
    path.write_bytes((tmp_path / "other" / "checkpoint" / "state.safetensors").read_bytes())
    words = "is of a run with num_steps 3, not 7"
    refused(ValueError, words, Config(str(tmp_path), "whole", True), recipe, tmp_path)


@dataclasses.dataclass(frozen=True)
class Later(Config):
    """Of a version with more options."""

    color: bool = False
    download: bool = False
    sizes: tuple[int, ...] = (1,)


@pytest.mark.parametrize("phase", ["step 3", "evaluation"])
@pytest.mark.parametrize("begun_by", [Config, Later])
def test_a_run_of_before_an_option_existed_goes_on(recipe, whole, tmp_path, begun_by, phase):
    def at(reached):
        if reached == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(begun_by(str(tmp_path), "cut"), recipe(at))
    checkpoint = tmp_path / "cut" / "checkpoint" / "state.safetensors"
    words = r"started with other settings \(color, sizes\)"
    other = Later(str(tmp_path), "cut", True, color=True, sizes=(2,))
    refused(ValueError, words, other, recipe, tmp_path)
    with pytest.raises(KeyboardInterrupt):  # where data come from is not what the run is
        run_job(Later(str(tmp_path), "cut", True, download=True), recipe(at))
    if begun_by is Config:
        assert b"color" not in checkpoint.read_bytes()
    run_job(Later(str(tmp_path), "cut", True), recipe())
    got = contents(tmp_path / "cut")
    assert got.keys() == whole.keys()
    assert got["weights.safetensors"] == whole["weights.safetensors"]
    assert (got == whole) == (begun_by is Config)


def test_a_checkpoint_that_says_download_goes_on(recipe, whole, tmp_path):
    """Runs told so for a time."""
    for name in ("results.json", "weights.safetensors"):
        (tmp_path / "whole" / name).unlink()
    path = tmp_path / "whole" / "checkpoint" / "state.safetensors"
    state = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fmeta.meta_train"])
    del header["checksum"]
    header["about"]["download"] = True
    save_file(state, path, {"fmeta.meta_train": json.dumps(header)})
    run_job(Later(str(tmp_path), "whole", True), recipe())
    got = contents(tmp_path / "whole")
    assert got["weights.safetensors"] == whole["weights.safetensors"]


@pytest.mark.parametrize("content", ["", '{"num_steps": ', "[]"])
@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_damaged_file_of_the_run_is_named(recipe, whole, tmp_path, name, content):
    (tmp_path / "whole" / name).write_text(content)
    words = rf"{name} is not (a whole JSON file|what the run wrote)"
    refused(ValueError, words, Config(str(tmp_path), "whole", True), recipe, tmp_path)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder(recipe, whole, tmp_path, resume):
    words = rf"whole is in use by another run \(process {os.getpid()}\)"
    with locked(tmp_path / "whole"):
        config = Config(str(tmp_path), "whole", resume)
        refused(BlockingIOError, words, config, recipe, tmp_path)


def test_what_a_killed_process_left_half_written_is_removed(recipe, whole, tmp_path):
    folder = tmp_path / "whole"
    for place in (folder, folder / "checkpoint"):
        (place / ".results.json-123-0123abcd.tmp").write_bytes(b"half")
    (folder / "results.json").unlink()
    (folder / "notes.tmp").write_text("mine")
    go_on(recipe, tmp_path, "whole")
    assert contents(folder) == {**whole, "notes.tmp": b"mine"}


def test_the_seed_of_torch_is_not_touched(recipe, tmp_path):
    before = torch.get_rng_state()
    run_job(Config(str(tmp_path)), recipe())
    assert torch.equal(before, torch.get_rng_state())
