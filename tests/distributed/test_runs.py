"""A run of several ranks is that of one; it survives the death of a rank, on any number of them."""

import json
import os
import signal
import time

import pytest
import torch

from fmeta.distributed import Ranks


@pytest.fixture(scope="module")
def alone(jobs, tmp_path_factory):
    """The run of one process, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    return jobs.meta_trained(Ranks.alone(), folder / "run"), folder


def same_run(got, want):
    assert got["step"] == want["step"]
    for name, x in want["meta_params"].items():
        torch.testing.assert_close(got["meta_params"][name], x, rtol=1e-9, atol=1e-9)


def same_files(folder, other):
    rows, wanted = (
        [json.loads(line) for line in (f / "run.jsonl").read_text().splitlines()]
        for f in (folder, other)
    )
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        assert row["meta_loss"] == pytest.approx(want["meta_loss"], rel=1e-9)
        assert row.get("diverged_tasks") == want.get("diverged_tasks")


def test_two_ranks_make_the_run_of_one(alone, on_two):
    for found in on_two:
        same_run(found["run"], alone[0])
        assert repr(found["run"]["history"]) == repr(on_two[0]["run"]["history"])  # nan != nan
    for row, want in zip(on_two[0]["run"]["history"], alone[0]["history"], strict=True):
        assert row == pytest.approx(want, rel=1e-9, nan_ok=True)


def test_stopped_on_two_and_resumed_on_three(alone, start, tmp_path):
    halves = start("half", tmp_path, 2)
    assert halves.wait()[0] != 0
    assert "KeyboardInterrupt" in halves.log(0)
    lost = halves.log(1).strip()
    assert "RankLost: rank 0 of 2" in lost
    assert lost.endswith("stopped: interrupted")
    found = start("goes_on", tmp_path, 3).results()
    for result in found:
        same_run(result, alone[0])
        assert result["history"][0]["step"] == 4  # the last checkpoint
    same_files(tmp_path, alone[1])


def test_killed_rank_ends_the_job_and_one_process_goes_on(jobs, alone, start, tmp_path):
    job = start("slow", tmp_path, 2)
    log = tmp_path / "run.jsonl"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (log.exists() and log.read_text().count("\n") >= 6):
        time.sleep(0.05)
    pid = job.pids[1]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait() == [1, -signal.SIGKILL]
    assert time.monotonic() - killed < 60
    assert f"RankLost: rank 1 of 2 (process {pid} on " in job.log(0)
    assert "has given no sign of life for 6 seconds: it was killed (out of memory?)" in job.log(0)
    same_run(jobs.meta_trained(Ranks.alone(), tmp_path / "run"), alone[0])
    same_files(tmp_path, alone[1])


def test_the_word_of_a_rank_that_fails_reaches_the_others(start, tmp_path):
    job = start("fails_on_one", tmp_path, 2)
    assert job.wait() == [1, 1]
    assert "RankLost: rank 1 of 2" in job.log(0)
    assert "stopped: ValueError: no such task" in job.log(0)
