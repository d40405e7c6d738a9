"""Files: written atomically, trees as safetensors, errors that name the path and the cure."""

from __future__ import annotations

import json
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fmeta import trees

__all__ = [
    "by_path",
    "checksum",
    "load_tree",
    "naming",
    "read_json",
    "read_metadata",
    "read_tensors",
    "remove_leftovers",
    "save_tree",
    "tree_of",
    "writable_folder",
    "write_bytes",
    "write_json",
    "write_text",
]


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Makes the folder and proves that a file can be written there, before any work is done.

    Raises:
        OSError: naming the folder and the reason.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(folder / "probe")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write into the folder {folder}: {error.strerror or error}; choose another one"
        ) from None
    return folder


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file atomically: readers see the old file or the new one, never a part."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not JSON (with the line).
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not a whole JSON file ({error})") from None


def save_tree(
    path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a tree of tensors as one safetensors file, atomically.

    Args:
        path: the file.
        tree: tree of tensors; each is stored under its path (``encoder/0.weight``).
        metadata: strings stored in the file's header.

    Raises:
        ValueError: two leaves with one path (``{"a/b": ..., "a": {"b": ...}}``).
    """
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in by_path(tree).items()}
    write_bytes(path, safetensors.torch.save(tensors, dict(metadata or {})))


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths.

    Raises:
        ValueError: two leaves with one path.
    """
    names = trees.paths(tree)
    found = dict(zip(names, trees.leaves(tree), strict=True))
    if len(found) < len(names):
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(
            f"two leaves of the tree have the path {twice}, under which a file can hold one: "
            "rename a key that contains '/'"
        )
    return found


def load_tree(path: str | os.PathLike[str], like: Any, *, any_float: bool = False) -> Any:
    """Reads a tree of tensors that `save_tree` wrote.

    Args:
        path: the file.
        like: a tree of the same structure; names, shapes and dtypes are checked against it.
        any_float: floating arrays may be of another floating dtype, which they keep.

    Raises:
        ValueError: no safetensors file, or arrays that are missing, superfluous or of another
            shape or dtype (with their names).
    """
    return tree_of(path, read_tensors(path), like, any_float=any_float)


def tree_of(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    like: Any,
    *,
    any_float: bool = False,
) -> Any:
    """The tree of the tensors that were read from a file, checked as `load_tree` says."""
    names = list(by_path(like))
    missing = [n for n in names if n not in tensors]
    extra = [n for n in tensors if n not in names]
    if missing or extra:
        raise ValueError(
            f"{path} does not hold the expected arrays: missing {missing or 'none'}, "
            f"unexpected {extra or 'none'}; was it written by another rule or version?"
        )
    flat, spec = trees.flatten(like)
    for name, want in zip(names, flat, strict=True):
        got = tensors[name]
        floats = any_float and got.is_floating_point() and want.is_floating_point()
        if got.shape != want.shape or not (floats or got.dtype == want.dtype):
            raise ValueError(
                f"{path}: array {name} has shape {tuple(got.shape)} and dtype {got.dtype}, "
                f"expected {tuple(want.shape)} and {want.dtype}"
            )
    return trees.unflatten(spec, [tensors[n] for n in names])


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> int:
    """CRC-32 of the tensors' bytes, in order of their names, and of a text."""
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        data: Any = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found = zlib.crc32(data, found)
    return found


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings in the header of a safetensors file."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, in memory of their own."""
    read_metadata(path)
    # Mapped ones would hold the file: on a full disk beside the one that replaces it, elsewhere
    # against its being replaced at all.
    with torch.no_grad():
        return {name: x.clone() for name, x in safetensors.torch.load_file(str(path)).items()}


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically, through a temporary one beside it.

    Raises:
        OSError: naming the file and the reason (a full disk, say); the old file is as it was.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}; make it")
    temporary = _temporary(path)
    with naming(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from inside says which file cannot be written, and why."""
    try:
        yield
    except OSError as error:
        named = OSError(
            f"cannot write {path}: {error.strerror or error}; what was written before is unharmed"
        )
        named.errno = error.errno
        raise named from None


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of a process that was killed while it wrote into the folder.

    Only for who holds the folder alone: another process may be writing.
    """
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


_TEMPORARY = re.compile(r"\..+-\d+-[0-9a-f]{8}\.tmp")


def _temporary(path: Path) -> Path:
    # Not mkstemp: its files are readable by their owner only, and the name would keep that.
    return path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
