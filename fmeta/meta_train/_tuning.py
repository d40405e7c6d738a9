"""The baselines' learning rates, searched for in a process beside meta-training.

Meta-training keeps one core busy and does not need them; the comparison after it does. Each search
goes into a file of the run's folder ``tuning/``, so that it is not repeated when a run is resumed.
What the other process has not done is done here: it may be missing, or killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from fmeta import _files
from fmeta.evaluate import BASELINES, Search, search_rates
from fmeta.meta_train._config import TrainConfig
from fmeta.meta_train._options import read_config

__all__ = ["COMPARISON", "Tuning", "lengths", "tune_all"]

# What longer trainings are compared with: to tune all again, ten times as long, takes minutes.
_LONG = ("adam", "adam_cosine", "muon_cosine")
_SEEDS, _SEEDS_LONG = 3, 2  # that each rate is tried on
COMPARISON = 1_000_037  # seed of the comparison, away from that of meta-training


def lengths(config: TrainConfig) -> dict[int, tuple[str, ...]]:
    """Inner steps of each comparison, and the baselines in it."""
    found = {}
    for length in config.eval_lengths:
        long = length > 1
        few = tuple(b for b in config.baselines if b in _LONG)
        found[length * max(config.horizons)] = few if long and few else config.baselines
    return found


class Tuning:
    """The searches of a run; within a ``with`` block another process works on them.

    That process ends with the block, and with this process, however that ends.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Tuning:
        folder = _folder(self.config)
        if folder.exists():
            _files.remove_leftovers(folder)
        if self.config.beside and any(_missing(self.config)):
            with contextlib.suppress(OSError):  # no process to spare: then it is done here
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "fmeta.meta_train._tuning", str(folder.parent)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is for this process, which ends the other
                )
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def searches(self, steps: int) -> dict[str, Search]:
        """What `search_rates` finds for the baselines of the comparison over that many steps."""
        if self.process is not None:
            self.process.wait()
        return {name: _search(self.config, steps, name) for name in lengths(self.config)[steps]}


def tune_all(config: TrainConfig) -> None:
    """All searches of a run, the longest first, which takes the most time."""
    for steps, name in _missing(config):
        _search(config, steps, name)


def _missing(config: TrainConfig) -> Iterator[tuple[int, str]]:
    for steps, names in sorted(lengths(config).items(), reverse=True):
        for name in names:
            if not _file(config, steps, name).exists():
                yield steps, name


def _search(config: TrainConfig, steps: int, name: str) -> Search:
    path = _file(config, steps, name)
    if path.exists():
        return _read(path)
    baseline = BASELINES[name]
    long = steps > max(config.horizons)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: the last bits depend on it
    try:
        found = search_rates(
            config.family(config.eval_task),
            baseline.build,
            baseline.rates,
            num_steps=steps,
            num_seeds=min(_SEEDS_LONG if long else _SEEDS, config.eval_seeds),
            seed=config.seed + COMPARISON,
        )
    finally:
        torch.set_num_threads(threads)
    path.parent.mkdir(exist_ok=True)
    scores = [x if math.isfinite(x) else None for x in found.scores]  # JSON has no infinity
    _files.write_json(path, {**found._asdict(), "scores": scores})
    return _read(path)


def _read(path: Path) -> Search:
    found = _files.read_json(path)
    try:
        scores = tuple(math.inf if x is None else float(x) for x in found["scores"])
        return Search(float(found["rate"]), tuple(found["rates"]), scores, int(found["extended"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged: delete it, and --resume searches again") from None


def _folder(config: TrainConfig) -> Path:
    return Path(config.out) / config.name / "tuning"


def _file(config: TrainConfig, steps: int, name: str) -> Path:
    return _folder(config) / f"{name}-{steps}.json"


def _end_with_parent() -> None:
    def wait() -> None:
        # Ends when the parent does, even when it is killed. (Not sys.stdin: a thread that reads it
        # aborts the interpreter's exit.)
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    stored = read_config(folder / "config.json", TrainConfig())
    here = dataclasses.replace(stored, out=str(folder.parent), name=folder.name)
    tune_all(here.checked())
