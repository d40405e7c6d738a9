"""Counts the bytes of tensors that live, operation by operation, on any device (also ``meta``)."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fmeta import trees

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """While it is active: memory of the tensors that operations make, until the last one goes.

    A memory that several tensors share counts once; what existed before does not count. What a
    kernel allocates and frees within one operation is not seen.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once.
        most: the most memories that were alive at once, of those counted.

    Example:
        >>> import torch
        >>> with LiveBytes() as count:
        ...     x = torch.zeros(1000) + 1
        >>> count.now, count.peak
        (4000, 8000)
    """

    def __init__(self, *existing: Any) -> None:
        super().__init__()
        self.now = self.peak = self.count = self.most = 0
        self.known: dict[int, Any] = {}
        for x in trees.leaves(existing):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for x in trees.leaves(out):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            if storage._cdata in self.known:
                continue
            if given is None:  # a view of what existed before is no new memory
                given = {
                    y.untyped_storage()._cdata
                    for y in trees.leaves((list(args), kwargs or {}))
                    if isinstance(y, Tensor)
                }
            self._note(storage, 0 if storage._cdata in given else storage.nbytes())
        return out

    def _note(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = weakref.finalize(storage, self._forget, key, size)
        self.known[key].atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)
        self.count += size > 0
        self.most = max(self.most, self.count)

    def _forget(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.now -= size
        self.count -= size > 0
