"""Processes joined by gloo run `parallel.py`: two once for all tests, four for a slow one."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PARALLEL = Path(__file__).parent / "parallel.py"
TIMEOUT = 180

CHILD = """
import faulthandler, importlib.util, sys
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
file, name, folder, rank, size, seconds = sys.argv[1:]
faulthandler.dump_traceback_later(float(seconds))  # says where a process waits for another
folder = Path(folder)
spec = importlib.util.spec_from_file_location("parallel", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
store = dist.FileStore(str(folder / "store"), int(size))
dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(size))
result = getattr(module, name)(folder)
torch.save(result, folder / f"result-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="session")
def parallel():
    """The helper file as a module: models, data and training loops of the tests."""
    spec = importlib.util.spec_from_file_location("parallel", PARALLEL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folder(parallel, tmp_path_factory):
    """What one process wrote before two were started, and what the two wrote and found.

    Workers of pytest-xdist share it: the first makes it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-processes"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + TIMEOUT + 60
        while not (folder / "ended").exists() and time.monotonic() < end:
            time.sleep(0.1)
    else:
        try:
            parallel.one_process(folder)
            run("everything", folder, 2)
        finally:
            (folder / "ended").touch()
    return folder


@pytest.fixture(scope="session")
def found(folder):
    """What `parallel.everything` gave on each of the two processes."""
    return results(folder, 2)


@pytest.fixture
def on_four(tmp_path):
    """``name -> results`` of that function of `parallel.py` on four processes."""
    return lambda name: (run(name, tmp_path, 4), results(tmp_path, 4))[1]


def results(folder, size):
    files = [folder / f"result-{rank}.pt" for rank in range(size)]
    if not all(file.exists() for file in files):
        logs = [f"{log.name}:\n{log.read_text()[-4000:]}" for log in sorted(folder.glob("log-*"))]
        pytest.fail("some process did not end well\n" + "\n".join(logs))
    return [torch.load(file, weights_only=True) for file in files]


def run(name, folder, size):
    """Starts the processes and ends them all: after a failure of one, or when time is up."""
    started = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(PARALLEL), name, str(folder)]
    try:
        for rank in range(size):
            with (folder / f"log-{rank}").open("w") as log:
                started.append(
                    subprocess.Popen(
                        [*command, str(rank), str(size), str(0.9 * TIMEOUT)],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                )
        end = time.monotonic() + TIMEOUT
        while any(p.poll() is None for p in started) and time.monotonic() < end:
            if any(p.poll() for p in started):  # the others would wait for it for ever
                time.sleep(0.5)
                break
            time.sleep(0.05)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
