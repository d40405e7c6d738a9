"""What the benchmarks share: CPU time in turns, peak memory of a call, tables, environment.

CPU time (all threads of the process) and not wall time, so that a busy machine changes little; the
competitors take turns, so that what it does change, it changes for all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = [
    "arguments",
    "environment",
    "finish",
    "measured",
    "median_times",
    "one_thread",
    "peak_memory",
    "table",
]

MB = 1e6


def arguments(description: str | None, *parts: str) -> argparse.Namespace:
    """The options every benchmark has, and a flag for each part that is asked for by name."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    chosen = parser.add_mutually_exclusive_group()
    for part in parts:
        chosen.add_argument(f"--{part}", action="store_true", help="this part (see above)")
    return parser.parse_args()


def median_times(
    competitors: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1, turn: float = 0.0
) -> dict[str, float]:
    """Median CPU seconds of each call; in every round each competitor has its turn.

    Args:
        competitors: name -> call; what it returns is dropped before the next one starts.
        repeats: number of rounds that count.
        warmup: rounds before them.
        turn: seconds that a turn lasts at least, in calls one after the other, as in a loop of
            training; of calls of some milliseconds a single one would find the caches full of what
            the others left there.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    calls = {name: _calls_in(turn, call) for name, call in competitors.items()}
    for round_ in range(warmup + repeats):
        for name, call in competitors.items():
            gc.collect()
            start = time.process_time()
            for _ in range(calls[name]):
                call()
            if round_ >= warmup:
                seconds[name].append((time.process_time() - start) / calls[name])
    return {name: statistics.median(s) for name, s in seconds.items()}


def _calls_in(turn: float, call: Callable[[], Any]) -> int:
    if not turn:
        return 1
    call()
    start = time.process_time()
    call()
    return max(1, math.ceil(turn / (time.process_time() - start)))


def peak_memory(module: str, function: str, *args: Any, repeats: int = 1) -> float:
    """Bytes by which a call raises the resident memory of a fresh process; median of repeats.

    The process imports ``module`` and calls ``function(*args) -> (warm_up, call)``. What is
    resident after ``warm_up()`` (imports, data, code that a first call pages in) is the baseline.

    Args:
        module: name of a module in this folder.
        function: name of a function in it.
        *args: numbers, strings and None.
        repeats: number of processes.
    """
    command = [sys.executable, __file__, module, function, json.dumps(args)]
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=one_thread())
        found.append(float(done.stdout.split()[-1]))
    return statistics.median(found)


def one_thread() -> dict[str, str]:
    """Environment of a process whose memory is measured."""
    # Freed blocks go back to the system at once, or one that was freed long ago would count.
    return {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def measured(warm_up: Callable[[], Any], call: Callable[[], Any]) -> float:
    """Bytes by which ``call()`` raises the resident memory of this process, after ``warm_up()``."""
    warm_up()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    unit = 1 if sys.platform == "darwin" else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def environment(*packages: str) -> dict[str, str]:
    """Machine and versions, for the results."""
    found = {
        "machine": f"{os.cpu_count()} cores, CPU ({platform.machine()})",
        "python": platform.python_version(),
    }
    for name in ("fmeta", "torch", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    cells = [list(rows[0]), *[[_cell(v) for v in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def finish(path: Path | None, results: Mapping[str, Any]) -> None:
    """Prints the environment and writes the JSON file if one is wanted."""
    print("\n" + ", ".join(f"{k} {v}" for k, v in results["environment"].items()))
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    name, function, given = sys.argv[1:]
    print(measured(*getattr(importlib.import_module(name), function)(*json.loads(given))))
