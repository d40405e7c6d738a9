"""Metrics of outer steps: JSON lines that a resumed run continues without a seam, TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fmeta import _files

__all__ = ["JsonLines", "StepLog", "summary_writer", "timing_path"]


class StepLog:
    """Where the metrics of outer steps go; nowhere, by default.

    Args:
        path: a ``.jsonl`` file; beside it, ``<name>.timing.jsonl`` holds the wall-clock seconds,
            which no two runs share.
        tensorboard: a folder of event files.
        step: the outer step to go on from; what was written of later ones is dropped.

    Raises:
        ImportError: ``tensorboard`` without the package.
        ValueError, OSError: as `JsonLines`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        tensorboard: str | os.PathLike[str] | None,
        step: int,
    ) -> None:
        self._board: Any = None
        if tensorboard is not None:
            folder = _files.writable_folder(tensorboard)
            self._board = summary_writer()(os.fspath(folder), purge_step=step)
        paths = [] if path is None else [Path(path), timing_path(path)]
        self._files = [JsonLines(p, step) for p in paths]

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()
        if self._board is not None:
            self._board.close()

    def write(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """Adds one outer step; ``metrics`` holds its ``"step"``."""
        step = metrics["step"]
        if self._files:
            steps, times = self._files
            steps.write(metrics)
            times.write({"step": step, "seconds": seconds})
        if self._board is not None:
            for name, value in {**metrics, "seconds": seconds}.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """All that was written is on the disk: a checkpoint of this step may be saved."""
        for file in self._files:
            file.sync()
        if self._board is not None:
            self._board.flush()


def timing_path(path: str | os.PathLike[str]) -> Path:
    """The file of wall-clock seconds that belongs to a file of metrics."""
    return Path(path).with_suffix(".timing.jsonl")


class JsonLines:
    """A file with one JSON object for each outer step, in order, appended whole.

    Args:
        path: the file. What it holds of outer steps from ``step`` on is cut off, a line that was
            written in part as well.
        step: the outer step of the next line.

    Raises:
        ValueError: the file is not there or does not reach up to ``step`` (above 0), or is of
            another kind.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._cut(step)
        with _files.naming(path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a line; a number that is not finite becomes null, which JSON can hold."""
        line = json.dumps({k: _plain(v) for k, v in row.items()}, allow_nan=False) + "\n"
        data = memoryview(line.encode())
        with _files.naming(self._path):
            while data:
                data = data[os.write(self._file, data) :]

    def sync(self) -> None:
        """What was written is on the disk."""
        with _files.naming(self._path):
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _cut(self, step: int) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        kept: list[bytes] = []
        for line in lines:
            at = self._step_of(line) if line.endswith(b"\n") else step
            if at >= step:
                break
            kept.append(line)
        reached = self._step_of(kept[-1]) + 1 if kept else 0
        if reached != step:
            raise ValueError(
                f"{self._path} holds the outer steps before {reached}, but the checkpoint goes on "
                f"at {step}: lines are missing; put the whole file back, resume without a log, or "
                "begin another run"
            )
        if len(kept) < len(lines):
            _files.write_bytes(self._path, b"".join(kept))

    def _step_of(self, line: bytes) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{self._path} is no log of outer steps (a line reads {line[:60]!r}): give the "
                "name of another file"
            ) from None


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_writer() -> Any:
    """TensorBoard's class, or an ImportError that names the extra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "event files need the package tensorboard: pip install 'fmeta[tensorboard]', or leave "
            "the option tensorboard out"
        ) from None
    return SummaryWriter
