"""`fmeta train` as a process of its own: signals, and kills at random moments."""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors import safe_open

from fmeta.cli import main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")

# Starts the command in forks of a process that has imported everything: imports take seconds.
SERVER = """
import json, os, signal, sys
import matplotlib.backends.backend_agg, scipy.stats, sklearn.datasets
from fmeta.cli import main
for line in sys.stdin:
    arguments, out, error = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
        for number, path in ((1, out), (2, error)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os._exit(main(arguments))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Process:
    def __init__(self, server, arguments, folder):
        self.server, self.out, self.error = server, folder / "stdout", folder / "stderr"
        line = json.dumps([arguments, str(self.out), str(self.error)])
        server.stdin.write(line + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def wait_for(self, text):
        while not (self.out.exists() and text in self.out.read_text()):
            time.sleep(0.002)

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(self.pid, number)

    def status(self):
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.stdin.close()


@pytest.fixture
def start(server, tmp_path):
    def begin(*options):
        options = ["train", "--smoke", "--out", str(tmp_path), *options]
        return Process(server, options, tmp_path)

    return begin


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """What an uninterrupted run writes, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole")
    began = time.perf_counter()
    assert Process(server, ["train", "--smoke", "--out", str(folder)], folder).status() == 0
    return contents(folder), time.perf_counter() - began


def contents(folder):
    """Bytes by name; seconds differ from run to run, and the configuration says where it is."""
    found = {}
    for path in sorted((folder / "digits").rglob("*")):
        if path.is_file() and not path.name.endswith(".timing.jsonl"):
            found[path.name] = path.read_bytes().replace(str(folder).encode(), b"OUT")
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["meta-training", "outer step 0"])
def test_a_signal_leaves_a_run_that_can_be_resumed_and_says_how(
    start, whole, tmp_path, phase, number
):
    process = start()
    process.wait_for(phase)
    process.send(number)
    process.send(number)  # impatient
    assert process.status() in (130, -number)  # the second may come when all is done but to end
    assert f"fmeta train --resume --out {tmp_path} --name digits" in process.error.read_text()
    assert start("--resume").status() == 0
    assert contents(tmp_path) == whole[0]


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(start, whole, tmp_path):
    """Tells its counts with ``python -m pytest -m slow -n0 -s -k hundred tests/cli``."""
    want, seconds = whole
    draw = random.Random(0)
    counts = collections.Counter()
    folder = tmp_path / "digits"
    checkpoint = folder / "checkpoint" / "state.safetensors"
    reached = 0  # the outer step of the last checkpoint seen
    while counts["kills"] < 100:
        process = start(*(["--resume"] if (folder / "config.json").exists() else []))
        time.sleep(draw.uniform(0, 0.8) * seconds)
        process.send(signal.SIGKILL)
        if process.status() == 0:  # was faster
            assert contents(tmp_path) == want
            counts["whole runs, equal to the uninterrupted one"] += 1
            shutil.rmtree(folder)
            reached = 0
            continue
        counts["kills"] += 1
        if checkpoint.exists():
            with safe_open(checkpoint, "pt") as held:  # raises where it is written by half
                step = json.loads(held.metadata()["fmeta.meta_train"])["numbers"]["step"]
                names = held.keys()
                assert all(held.get_tensor(name).isfinite().all() for name in names)
            assert step >= reached, "a checkpoint was lost"
            reached = step
            counts["checkpoints read after a kill"] += 1
        counts["half-written files put aside"] += len(list(folder.rglob(".*.tmp")))
    assert start("--resume").status() == 0
    assert contents(tmp_path) == want
    print(dict(counts))


@pytest.mark.parametrize(
    "kills", [2, pytest.param(20, marks=pytest.mark.slow)], ids="{} kills".format
)
def test_killed_again_and_again_the_rest_gives_the_same_bytes(start, whole, tmp_path, kills):
    draw = random.Random(kills)
    killed_and_resumed(start, whole, tmp_path, [draw.uniform(0, 0.5) for _ in range(kills)])


def killed_and_resumed(start, whole, folder, moments):
    """Kills after each of these parts of the time of a whole run, then lets it finish."""
    want, seconds = whole
    for moment in (*moments, None):
        begun = (folder / "digits" / "config.json").exists()
        process = start(*(["--resume"] if begun else []))
        if moment is not None:
            time.sleep(moment * seconds)
            process.send(signal.SIGKILL)
        assert process.status() in ((0,) if moment is None else (0, -signal.SIGKILL))
    assert contents(folder) == want


def test_a_second_run_in_the_folder_of_one_that_is_going_on(start, whole, tmp_path, capsys):
    process = start()
    process.wait_for("meta-training")
    process.send(signal.SIGSTOP)  # so that it is still going on
    for options in ([], ["--resume"]):
        assert main(["train", "--smoke", "--out", str(tmp_path), *options]) == 1
        error = capsys.readouterr().err
        assert f"digits is in use by another run (process {process.pid})" in error
    process.send(signal.SIGCONT)
    assert process.status() == 0
    assert contents(tmp_path) == whole[0]
