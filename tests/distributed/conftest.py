"""Processes joined as by torchrun run the functions of `jobs.py`; two once for all tests."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

JOBS = Path(__file__).parent / "jobs.py"
TIMEOUT = 150

CHILD = """
import faulthandler, importlib.util, sys
from pathlib import Path
import torch
from fmeta.distributed import joined
torch.set_num_threads(1)
file, name, folder, seconds = sys.argv[1:]
faulthandler.dump_traceback_later(float(seconds))  # says where a process waits for another
spec = importlib.util.spec_from_file_location("jobs", file)
jobs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jobs)
with joined(patience=6.0) as ranks:
    result = getattr(jobs, name)(ranks, Path(folder))
torch.save(result, Path(folder) / f"{name}-{ranks.rank}.pt")
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
        base = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        base = {**os.environ, **base, "MASTER_PORT": port}
        command = [sys.executable, "-c", CHILD, str(JOBS), name, str(folder), str(0.9 * TIMEOUT)]
        self.processes = []
        for rank in range(size):
            with (folder / f"{name}-{rank}.log").open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
                )

    def log(self, rank):
        return (self.folder / f"{self.name}-{rank}.log").read_text()

    def wait(self, ranks=None):
        """Until these have ended; then all are killed."""
        waited = [self.processes[r] for r in (range(self.size) if ranks is None else ranks)]
        end = time.monotonic() + TIMEOUT
        while any(p.poll() is None for p in waited) and time.monotonic() < end:
            time.sleep(0.05)
        codes = [p.poll() for p in self.processes]
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        return codes

    def results(self):
        """What the function gave on each rank."""
        if any(self.wait()):
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
