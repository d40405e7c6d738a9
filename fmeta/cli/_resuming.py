"""What a job tells whose run was interrupted, and which of its processes tells it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from fmeta.meta_train._checkpoint import NAME

__all__ = ["how_to_resume", "is_shown_rank", "processes", "resume_command"]


def how_to_resume(command: str, config: Any) -> str:
    """How far the run in ``config.out/config.name`` has come, and what goes on with it.

    Args:
        command: ``"train"`` or ``"fewshot"``.
        config: with ``out`` and ``name``.
    """
    folder = Path(config.out) / config.name
    if not (folder / "config.json").exists():
        return "interrupted before the run began: nothing is lost, start it again"
    again = resume_command(command, config)
    if not (folder / "checkpoint" / NAME).exists():
        return f"interrupted before there was anything to save; --resume starts the run: {again}"
    if processes() > 1:
        return (
            "the last checkpoint is saved, and --resume goes on from there, with any number of "
            f"processes: {again}"
        )
    return (
        f"interrupted; the last complete state is saved, and --resume goes on from there: {again}"
    )


def resume_command(command: str, config: Any) -> str:
    program = ["fmeta"]
    if processes() > 1:
        program = ["torchrun", "--nproc-per-node", str(processes()), "-m", "fmeta"]
    return shlex.join([*program, command, "--resume", "--out", config.out, "--name", config.name])


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_shown_rank() -> bool:
    """Whether this is the one process of the job that writes to the terminal."""
    return os.environ.get("RANK", "0") == "0"
