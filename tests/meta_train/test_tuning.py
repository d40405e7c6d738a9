"""Searches beside meta-training: the same as without, done once, and over with the run."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from fmeta.evaluate import BASELINES, search_rates
from fmeta.meta_train import TrainConfig
from fmeta.meta_train._tuning import COMPARISON, Tuning, lengths, tune_all


def config_in(folder, **changes):
    config = TrainConfig(out=str(folder), name="run", smoke=True).checked()
    config = dataclasses.replace(config, batch_size=8, eval_task="mlp:4", **changes)
    (folder / "run").mkdir(exist_ok=True)
    stored = {k: v for k, v in dataclasses.asdict(config).items() if k != "resume"}
    (folder / "run" / "config.json").write_text(json.dumps(stored))
    return config


def files(folder):
    return {p.name: p.read_bytes() for p in (folder / "run" / "tuning").iterdir()}


def test_searches_are_those_of_evaluate(tmp_path):
    config = config_in(tmp_path)
    found = Tuning(config).searches(8)["adam"]
    want = search_rates(
        config.family("mlp:4"), BASELINES["adam"].build, BASELINES["adam"].rates,
        num_steps=8, num_seeds=3, seed=config.seed + COMPARISON,
    )  # fmt: skip
    assert found == want


def test_the_other_process_finds_the_same(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    tune_all(config_in(here))
    config = config_in(there, beside=True)
    with Tuning(config) as tuning:
        assert tuning.process is not None
        tuning.process.wait()
        assert tuning.process.returncode == 0
        beside = files(there)
        tuning.searches(8)
    assert beside == files(here)
    assert set(beside) == {"adam-8.json", "adam-16.json"}


def test_what_is_found_is_not_searched_again(tmp_path):
    config = config_in(tmp_path, beside=True)
    tune_all(config)
    path = tmp_path / "run" / "tuning" / "adam-8.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rate": 123.0}))
    with Tuning(config) as tuning:
        assert tuning.process is None
        assert tuning.searches(8)["adam"].rate == 123.0


def test_a_process_that_fails_is_made_up_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Tuning(config_in(tmp_path, beside=True)) as tuning:
        assert set(tuning.searches(8)) == {"adam"}


def test_the_process_ends_with_the_block(tmp_path):
    with Tuning(config_in(tmp_path, beside=True)) as tuning:
        process = tuning.process
    assert process.returncode is not None


@pytest.mark.slow
def test_the_process_ends_when_its_parent_is_killed(tmp_path):
    config_in(tmp_path, eval_lengths=(1, 1000))  # minutes of work
    command = [sys.executable, "-m", "fmeta.meta_train._tuning", str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        time.sleep(6)
        assert child.poll() is None
        child.stdin.close()  # as the system does for a process that is killed
        assert child.wait(60) == 1


def test_a_damaged_file_is_a_sentence(tmp_path):
    config = config_in(tmp_path)
    tune_all(config)
    (tmp_path / "run" / "tuning" / "adam-8.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adam-8.json is damaged: delete it"):
        Tuning(config).searches(8)


def test_longer_comparisons_have_fewer_baselines():
    config = TrainConfig()
    assert lengths(config) == {
        200: tuple(BASELINES),
        1000: ("adam", "adam_cosine", "muon_cosine"),
        2000: ("adam", "adam_cosine", "muon_cosine"),
    }
