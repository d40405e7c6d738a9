"""One run in a folder at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fmeta import _files

try:
    import fcntl
except ImportError:  # no POSIX system: folders are not locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]

_NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone.

    The system's lock on a file, not the file, is what counts: a killed process holds nothing.

    Args:
        folder: an existing folder; the file ``.lock`` in it holds the process id meanwhile.

    Raises:
        BlockingIOError: another run holds it, with its process id.
    """
    if fcntl is None:
        yield
        return
    path = folder / _NAME
    file = _acquire(path)
    try:
        yield
    finally:
        # While the lock is held, so that nobody's new file is removed.
        path.unlink(missing_ok=True)
        os.close(file)


def _acquire(path: Path) -> int:
    while True:
        with _files.naming(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                with _files.naming(path):
                    os.ftruncate(file, 0)
                    os.write(file, f"{os.getpid()}\n".encode())
                return file
        except BlockingIOError:
            pid = os.read(file, 32).decode(errors="replace").strip() or "unknown"
            os.close(file)
            raise BlockingIOError(
                f"{path.parent} is in use by another run (process {pid}): wait for it, stop it, "
                "or choose another folder or name"
            ) from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its owner removed the file between our two calls


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
