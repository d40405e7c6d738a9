"""All that is needed to resume, in one file: tensors as safetensors, numbers as JSON in its header.

One file, because two could be of different outer steps after a power cut.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fmeta import _files, trees

__all__ = ["NAME", "about_as_saved", "load", "require", "save"]

NAME = "state.safetensors"
_KEY, _FORMAT = "fmeta.meta_train", 1


def save(path: Path, state: Any, about: Mapping[str, Any]) -> None:
    """Writes a state atomically.

    Args:
        path: the file.
        state: tree of tensors and plain numbers.
        about: plain values that say which run it is of.

    Raises:
        OSError: it cannot be written; the checkpoint before it is as it was.
    """
    flat = _files.by_path(state)
    tensors = {n: x for n, x in flat.items() if isinstance(x, Tensor)}
    numbers = {n: x for n, x in flat.items() if not isinstance(x, Tensor)}
    # One entry: safetensors writes several in any order, and equal states give equal files.
    header = {"format": _FORMAT, "about": dict(about), "numbers": numbers}
    header["checksum"] = _files.checksum(tensors, json.dumps(header))
    _files.save_tree(path, tensors, {_KEY: json.dumps(header)})


def load(path: Path, like: Any, about: Mapping[str, Any]) -> Any:
    """Reads what `save` wrote.

    Args:
        path: the file.
        like: a state of the same structure; its tensors say the devices.
        about: must be equal to what was saved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, of another program, or of another run (naming what
            differs).
    """
    header, arrays = _header(path), _files.read_tensors(path)
    _check_sum(path, header, arrays)
    _check_same(path, header["about"], dict(about))
    spec, flat = trees.flatten(like)[1], _files.by_path(like)
    wanted = {n: x for n, x in flat.items() if isinstance(x, Tensor)}
    numbers, tensors = header["numbers"], _files.tree_of(path, arrays, wanted)
    missing = [n for n in flat if n not in numbers and n not in tensors]
    if missing:
        raise ValueError(
            f"{path} lacks {missing}: it is of another estimator or optimizer; resume with those "
            "of its run, or start a run in another folder"
        )
    return trees.unflatten(
        spec,
        [tensors[n].to(x.device) if isinstance(x, Tensor) else numbers[n] for n, x in flat.items()],
    )


def about_as_saved(
    path: Path, about: Mapping[str, Any], defaults: Mapping[str, Any], free: Collection[str]
) -> dict[str, Any]:
    """``about`` in the words of a file that may be older than some of its options.

    Args:
        path: the file.
        about: as of `load`.
        defaults: of options; one with this value is left out where the file does not know it.
        free: options that may be others than in the file, whose values are taken over.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    saved = _header(path)["about"]
    if not isinstance(saved, dict):  # damaged, as `load` will say
        return dict(about)
    nothing = object()
    known = {
        name: value
        for name, value in about.items()
        if name not in free and (name in saved or value != defaults.get(name, nothing))
    }
    return known | {name: saved[name] for name in free if name in saved}


def require(path: Path) -> None:
    """Raises a FileNotFoundError that says what to do without a checkpoint."""
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file {path}, so there is nothing to resume: start with run(...), or give "
            "the folder of another run"
        )


def _header(path: Path) -> dict[str, Any]:
    require(path)
    try:
        metadata = _files.read_metadata(path)
    except ValueError as error:
        raise ValueError(f"{error}: put back a copy of it, or delete it and start again") from None
    if _KEY not in metadata:
        raise ValueError(
            f"{path} is no checkpoint of fmeta.meta_train: give the folder of one; weights alone "
            "are loaded by fmeta.pretrained.load"
        )
    try:
        header = json.loads(metadata[_KEY])
        version, whole = header["format"], {"about", "numbers"} <= header.keys()
    except (ValueError, TypeError, KeyError):
        version, whole = _FORMAT, False
    if version != _FORMAT:
        raise ValueError(
            f"{path} has format {version!r}, but this version reads {_FORMAT}: resume with the "
            "version that wrote it"
        )
    if not whole:
        raise ValueError(
            f"{path} has a header that is damaged: put back a copy of it, or delete it and start "
            "again"
        )
    return dict(header)


def _check_sum(path: Path, header: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    """Raises for bytes that are not those that were written; older files have no sum."""
    saved = header.pop("checksum", None)
    if saved is not None and saved != _files.checksum(arrays, json.dumps(header)):
        raise ValueError(
            f"{path} is damaged: its bytes are not those that were written; put back a copy of it, "
            "or delete it and start again"
        )


def _check_same(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    given = json.loads(json.dumps(given))  # tuples are lists in the file
    for name in sorted({*saved, *given}):
        old, new = saved.get(name), given.get(name)
        if old != new:
            raise ValueError(
                f"{path} is of a run with {name} {old!r}, not {new!r}: resume with the same, or "
                "start a run in another folder"
            )
