"""Signs of life: which process of a job has ended, when one has."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any, NamedTuple

__all__ = ["Lost", "Watch"]

_WORD = "lost"


class Lost(NamedTuple):
    """A rank that has ended.

    Attributes:
        rank: which.
        where: its process and host.
        reason: what it said; empty for nothing.
        seconds: how long it had given no sign of life.
    """

    rank: int
    where: str
    reason: str
    seconds: float


class Watch:
    """A thread that shows that this process lives and looks after its neighbour.

    Every ``interval`` it counts up a number in the job's store and reads that of the next rank; who
    finds that it has stood still for ``patience`` seconds writes so into the store, where all read
    it. So the traffic of a rank does not grow with their number.

    Args:
        store: of `torch.distributed`, for this thread alone.
        rank, size: this process among the others.
        patience: seconds without a sign of life after which a rank counts as lost.
        interval: seconds between two signs.
    """

    def __init__(
        self, store: Any, rank: int, size: int, *, patience: float, interval: float = 1.0
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.patience, self.interval = patience, min(interval, patience / 4)
        self.lost: Lost | None = None
        self.has_spoken = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fmeta-watch", daemon=True)
        where = f"process {os.getpid()} on {socket.gethostname()}"
        store.set(f"where/{rank}", where)
        self._thread.start()

    def say(self, reason: str) -> None:
        """The last word of this rank: why it ends."""
        self.has_spoken = True
        self._tell(Lost(self.rank, self._where(self.rank), reason, 0.0))

    def wait_for_word(self) -> None:
        """Waits until it is known which rank was lost, or it should have been."""
        end = time.monotonic() + self.patience + 4 * self.interval
        while self.lost is None and time.monotonic() < end and self._thread.is_alive():
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join(2 * self.interval)

    def _run(self) -> None:
        neighbour, seen, still, beat = (self.rank + 1) % self.size, "", 0, 0
        while not self._stop.wait(self.interval):
            beat += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beat))
                if self.store.check([_WORD]):
                    self.lost = Lost(*json.loads(self.store.get(_WORD)))
                    return
                now = self._read(f"beat/{neighbour}")
                # Looks, not seconds, are counted: a job that was suspended as a whole goes on.
                still = still + 1 if now == seen else 0
                seen = now
                if still * self.interval >= self.patience:
                    silent = still * self.interval
                    self._tell(Lost(neighbour, self._where(neighbour), "", silent))
            except RuntimeError:  # the store is gone, and with it who held it
                if not self._stop.is_set():
                    reason = "the job's store (at MASTER_ADDR) cannot be reached"
                    self.lost = Lost(0, "", reason, 0.0)
                return

    def _tell(self, lost: Lost) -> None:
        # Whoever comes first is right: later losses follow from it.
        self.store.compare_set(_WORD, "", json.dumps(lost))

    def _where(self, rank: int) -> str:
        return self._read(f"where/{rank}")

    def _read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""
