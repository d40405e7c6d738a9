"""``torchrun -m fmeta train``: one job of several processes, killed, resumed on other numbers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SETTINGS = [
    *("--num-steps", "12", "--tasks", "mlp:8", "mlp:6", "--num-tasks", "5", "--horizons", "6"),
    *("--truncation", "3", "--validation-task", "mlp:8", "--validation-seeds", "2"),
    *("--validate-every", "4", "--save-every", "4", "--eval-task", "mlp:8", "--eval-seeds", "2"),
    *("--eval-lengths", "1", "--baselines", "adam", "--no-beside", "--name", "run"),
]


def train(out, processes, *arguments):
    """The command under way, with all that it says in a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        start += ["--master-port", port]
    with (out / "said.txt").open("w") as said:
        return subprocess.Popen(
            [*start, "-m", "fmeta", "train", "--out", str(out), *arguments],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def rows(out):
    file = out / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def ranks_of(torchrun):
    """Process ids by rank."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{torchrun.pid}\n" in status.read_text():
                variables = (status.parent / "environ").read_bytes().split(b"\0")
                rank = next((v for v in variables if v.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank.removeprefix(b"RANK="))] = int(status.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    assert train(out, 1, *SETTINGS).wait(300) == 0, (out / "said.txt").read_text()
    return rows(out)


def same(found, want):
    assert len(found) == len(want)
    for row, other in zip(found, want, strict=True):
        assert row == pytest.approx(other, rel=1e-3)  # float32, and an outer step amplifies it


def test_two_processes_make_the_run_of_one_and_one_of_them_speaks(alone, tmp_path):
    job = train(tmp_path, 2, *SETTINGS)
    said = tmp_path / "said.txt"
    assert job.wait(300) == 0, said.read_text()
    same(rows(tmp_path), alone)
    assert said.read_text().count("outer step 11 of 12") == 1
    assert said.read_text().count("everything is in") == 1


def test_the_rule_as_a_policy_whose_baseline_is_over_the_tasks_of_all(tmp_path):
    found = []
    for processes in (1, 2, 4):
        out = tmp_path / str(processes)
        out.mkdir()
        job = train(out, processes, *SETTINGS, "--estimator", "score_function")
        assert job.wait(300) == 0, (out / "said.txt").read_text()
        found.append(rows(out))
    same(found[1], found[0])
    same(found[2], found[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_and_three_processes_go_on(alone, tmp_path, rank):
    job = train(tmp_path, 2, *SETTINGS)
    end = time.monotonic() + 200
    while len(rows(tmp_path)) < 5 and time.monotonic() < end and job.poll() is None:
        time.sleep(0.02)
    os.kill(ranks_of(job)[rank], signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait(60) != 0
    assert time.monotonic() - killed < 60
    said = (tmp_path / "said.txt").read_text()
    assert "Signal 9 (SIGKILL)" in said  # by torchrun
    if rank == 1:
        assert "fmeta: stopped, by hand or because another process ended" in said
        assert "--resume --out" in said
    job = train(tmp_path, 3, "--name", "run", "--resume")
    assert job.wait(300) == 0, (tmp_path / "said.txt").read_text()
    same(rows(tmp_path), alone)
    assert (tmp_path / "run" / "results.json").exists()
