"""Runs functions of a helper file in several processes that are joined by gloo."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PARALLEL = HERE / "parallel.py"

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
def in_processes():
    """``(name, folder, size=2) -> results``: what ``parallel.<name>(folder)`` gives on each rank.

    All processes are ended after a failure of one, and after ``timeout`` seconds.
    """

    def run(name, folder, size=2, timeout=120):
        started, logs = [], [folder / f"log-{rank}" for rank in range(size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, "-c", CHILD, str(PARALLEL), name, str(folder)]
                with log.open("w") as out:
                    started.append(
                        subprocess.Popen(
                            [*command, str(rank), str(size), str(0.9 * timeout)],
                            stdout=out,
                            stderr=subprocess.STDOUT,
                            env=environment,
                        )
                    )
            end = time.monotonic() + timeout
            while any(p.poll() is None for p in started) and time.monotonic() < end:
                if any(p.poll() for p in started):  # the others would wait for it for ever
                    time.sleep(0.5)
                    break
                time.sleep(0.02)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
            codes = [process.wait() for process in started]
        if any(codes):
            text = "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs)
            pytest.fail(f"{name} on {size} processes: exit codes {codes}\n{text}")
        return [torch.load(folder / f"result-{r}.pt", weights_only=True) for r in range(size)]

    return run
