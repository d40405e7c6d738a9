"""The folder of one run of a job: whose it is, with which configuration, how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fmeta import _files
from fmeta.meta_train._lock import locked

__all__ = ["CONFIG", "METRICS", "RESULTS", "WEIGHTS", "WHERE", "read_object", "run_folder"]

CONFIG, METRICS = "config.json", "metrics.jsonl"
WEIGHTS, RESULTS = "weights.safetensors", "results.json"

# Options that say where a run and its data are, not what it is: a folder may be moved and resumed.
WHERE = ("out", "name", "resume", "download")


@contextmanager
def run_folder(
    folder: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[Path]:
    """Holds the folder of a run for this process, new or, with ``resume`` set, as it was left.

    The configuration is written into it first, so that every later state can be resumed.

    Args:
        folder: made with its parents.
        config: plain values by name; ``"resume"`` among them.
        defaults: what an option is of which a run begun before there was one says nothing.

    Raises:
        FileExistsError: it holds a run, and ``resume`` is not set.
        FileNotFoundError: it holds none, and it is.
        ValueError: it holds a run of another configuration (with the options that differ).
        BlockingIOError: another process is running in it.
        OSError: it cannot be written.
    """
    if config["resume"] and not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"there is no run to resume in {folder} (no {CONFIG}): leave --resume out to start "
            "one, or give its --out and --name"
        )
    with locked(_files.writable_folder(folder)):
        _files.remove_leftovers(folder)
        if config["resume"]:
            _check_same(folder, config, defaults)
        else:
            _check_empty(folder)
            stored = {name: value for name, value in config.items() if name != "resume"}
            _files.write_json(folder / CONFIG, stored)
        yield folder


def read_object(path: Path) -> dict[str, Any]:
    """What a run wrote as a JSON object.

    Raises:
        ValueError: a damaged file.
    """
    found = _files.read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not what the run wrote: put back a copy of it, or delete it")
    return found


def _check_empty(folder: Path) -> None:
    for name in (CONFIG, METRICS, WEIGHTS, RESULTS, "checkpoint"):
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder} holds a run already: choose another --name, delete it, or add --resume "
                "to go on with it"
            )


def _check_same(folder: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    before = {k: _plain(v) for k, v in defaults.items()} | read_object(folder / CONFIG)
    changed = [k for k in config if k not in WHERE and before.get(k) != _plain(config[k])]
    if changed:
        raise ValueError(
            f"the run in {folder} was started with other settings ({', '.join(changed)}): resume "
            "with the same ones (--resume alone takes them from its config.json), or start a run "
            "of another --name"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
