"""Processes joined as by torchrun run the functions of `jobs.py`; two once for all tests."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

JOBS = Path(__file__).parent / "jobs.py"
TIMEOUT = 400  # seconds; much for four processes on two busy cores

# One process imports what all need, then it forks the ranks: before it has started a thread.
PARENT = """
import faulthandler, importlib.util, json, os, sys, traceback
from pathlib import Path
import torch
from fmeta.distributed import joined
torch.set_num_threads(1)
file, name, folder, size, seconds = sys.argv[1:]
folder = Path(folder)
spec = importlib.util.spec_from_file_location("jobs", file)
jobs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jobs)
torch.vmap(torch.sin)(torch.ones(1))  # its first call imports much, too

def rank_of_the_job(rank):
    log = os.open(folder / f"{name}-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(float(seconds))  # says where a process waits for another
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    # A busy machine must not be taken for a lost rank, but where one is killed.
    with joined(patience=6.0 if name == "slow" else 60.0) as ranks:
        result = getattr(jobs, name)(ranks, folder)
    torch.save(result, folder / f"{name}-{rank}.pt")

pids = []
for rank in range(int(size)):
    pids.append(os.fork())
    if not pids[-1]:
        rank_of_the_job(rank)  # what it raises ends this process with a traceback, as it would
        sys.exit(0)
(folder / f"{name}.pids").write_text(json.dumps(pids) + " ")
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
(folder / f"{name}.codes").write_text(json.dumps(codes))
"""


@pytest.fixture(scope="session")
def jobs():
    """The helper file as a module."""
    spec = importlib.util.spec_from_file_location("jobs", JOBS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Started:
    """Processes of a job under way."""

    def __init__(self, name, folder, size):
        self.name, self.folder, self.size = name, folder, size
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        extra = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-c", PARENT, str(JOBS), name, str(folder), str(size)]
        self.parent = subprocess.Popen(
            [*command, str(0.9 * TIMEOUT)],
            env={**os.environ, **extra, "MASTER_PORT": port},
            start_new_session=True,
        )

    def log(self, rank):
        return (self.folder / f"{self.name}-{rank}.log").read_text()

    @property
    def pids(self):
        """Of the ranks, once they have been started."""
        file = self.folder / f"{self.name}.pids"
        return json.loads(file.read_text()) if file.exists() else []

    def wait(self):
        """Exit codes of the ranks, when all have ended; those that do not are killed."""
        try:
            self.parent.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(self.parent.pid, signal.SIGKILL)
            self.parent.wait()
        file = self.folder / f"{self.name}.codes"
        return json.loads(file.read_text()) if file.exists() else [None] * self.size

    def results(self):
        """What the function gave on each rank."""
        if self.wait() != [0] * self.size:
            logs = "\n".join(f"rank {r}:\n{self.log(r)[-3000:]}" for r in range(self.size))
            pytest.fail(f"some process did not end well\n{logs}")
        files = [self.folder / f"{self.name}-{r}.pt" for r in range(self.size)]
        return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture(scope="session")
def start():
    """``start(name, folder, size)``: that function of `jobs.py` on so many processes."""
    return Started


@pytest.fixture(scope="session")
def on_two(tmp_path_factory):
    """What `jobs.everything` gave on each of two processes.

    Workers of pytest-xdist share it: the first makes it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-ranks"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + TIMEOUT + 30
        while not (folder / "ended").exists() and time.monotonic() < end:
            time.sleep(0.1)
        files = [folder / f"everything-{r}.pt" for r in range(2)]
        return [torch.load(file, weights_only=True) for file in files]
    try:
        return Started("everything", folder, 2).results()
    finally:
        (folder / "ended").touch()
