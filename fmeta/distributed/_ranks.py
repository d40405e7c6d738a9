"""The processes of a job, and the four ways in which they exchange tensors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fmeta import trees
from fmeta.distributed._packing import pack_rows, unpack_rows
from fmeta.distributed._watch import Lost, Watch

__all__ = ["RankLost", "Ranks", "check_ranks"]

Tree = Any
OnExchange = Callable[[str, int], None]

_LONGEST_PAUSE = 1e-3  # seconds between two looks at an exchange that is under way


class RankLost(RuntimeError):
    """Another process of the job has ended, so that this one cannot go on.

    Attributes:
        rank: which one, -1 where it is not known.
        reason: what it said before it ended; empty when it was killed.
        is_told_here: whether this is the one rank that should tell it: the first of those left.
    """

    def __init__(
        self, message: str, rank: int = -1, reason: str = "", *, is_told_here: bool = True
    ) -> None:
        super().__init__(message)
        self.rank, self.reason = rank, reason
        self.is_told_here = is_told_here


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those of a job.

    All exchanges are collective: every rank makes the same calls in the same order. Alone, they
    give back what they were given.

    Args:
        rank: of this process, from 0.
        size: number of processes.
        group: of `torch.distributed`; None: the default one.
        watch: tells of ranks that ended; None: an exchange then waits as long as the group does.
        on_exchange: called with the kind and the bytes that this rank contributes to each
            exchange.
        redraws: in evolution strategies ranks draw each other's perturbations again and exchange
            scalars only, which takes the time of drawing all of them. False: each draws its own,
            and they exchange the sum, as many numbers as there are weights: better for many ranks.

    Example:
        >>> Ranks.alone()
        Ranks(rank=0, size=1)
    """

    rank: int = 0
    size: int = 1
    group: Any = dataclasses.field(default=None, repr=False)
    watch: Watch | None = dataclasses.field(default=None, repr=False)
    on_exchange: OnExchange | None = dataclasses.field(default=None, repr=False)
    redraws: bool = dataclasses.field(default=True, repr=False)

    @staticmethod
    def alone() -> Ranks:
        """One process."""
        return Ranks()

    @staticmethod
    def of_group(group: Any = None) -> Ranks:
        """The ranks of a group of `torch.distributed`, which the caller has initialised.

        Raises:
            RuntimeError: it is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed is not initialised: use `with fmeta.distributed.joined() as "
                "ranks`, or call torch.distributed.init_process_group first"
            )
        return Ranks(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes, logs and shows."""
        return self.rank == 0

    def sum(self, buffer: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, bit for bit the same on each."""
        if self.size == 1:
            return buffer
        found = self._place(buffer).clone()
        self._tell("all_reduce", found)
        self._wait(lambda: dist.all_reduce(found, group=self.group, async_op=True))
        return found.to(buffer.device)

    def gather(self, rows: Tree, counts: list[int], *, to_first: bool = False) -> Tree:
        """The rows of all ranks, one after the other.

        Args:
            rows: tree of tensors ``(counts[rank], ...)``.
            counts: how many rows each rank has; where a rank has none, its tensors still say the
                other dimensions and the dtypes.
            to_first: only rank 0 gets them.

        Returns:
            A tree of tensors ``(sum(counts), ...)``; with ``to_first`` None on the others.
        """
        if self.size == 1 or not trees.leaves(rows):
            return rows
        block = self._place(pack_rows(rows))
        most = max(counts)
        padded = block.new_zeros(most, block.shape[1])
        padded[: len(block)] = block
        self._tell("gather" if to_first else "all_gather", padded)
        found = None
        if self.is_first or not to_first:
            found = [torch.empty_like(padded) for _ in counts]
        if to_first:
            self._wait(
                lambda: dist.gather(padded, found, group=self.group, group_dst=0, async_op=True)
            )
        else:
            self._wait(lambda: dist.all_gather(found, padded, group=self.group, async_op=True))
        if found is None:
            return None
        kept = [part[:n] for part, n in zip(found, counts, strict=True)]
        return unpack_rows(torch.cat(kept), rows)

    def broadcast(self, value: Tensor) -> Tensor:
        """Rank 0's tensor; that of the others says shape and dtype."""
        if self.size == 1:
            return value
        found = self._place(value).clone().contiguous()
        self._tell("broadcast", found)
        self._wait(lambda: dist.broadcast(found, group=self.group, group_src=0, async_op=True))
        return found.to(value.device)

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's bytes; what the others give is not looked at."""
        if self.size == 1:
            return data
        length = int(self.broadcast(torch.tensor(len(data))))
        held = torch.zeros(length, dtype=torch.uint8)
        if self.is_first and length:
            held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self.broadcast(held).numpy().tobytes() if length else b""

    def wait_for_all(self) -> None:
        """Returns when all ranks have come here."""
        self.sum(torch.zeros(1))

    def _place(self, x: Tensor) -> Tensor:
        """On a device that the group can send from."""
        backend = dist.get_backend_config(self.group)
        if x.is_cuda:
            return x if "cuda:nccl" in backend else x.cpu()
        return x if "cpu:" in backend else x.cuda()

    def _tell(self, kind: str, x: Tensor) -> None:
        if self.on_exchange is not None:
            self.on_exchange(kind, x.numel() * x.element_size())

    def _wait(self, begin: Callable[[], Any]) -> None:
        """Waits in Python, so that Ctrl-C and the loss of a rank are noticed meanwhile."""
        try:
            work, pause = begin(), 2e-5
            while not work.is_completed():
                self._raise_if_lost()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            work.wait()
        except RankLost:
            raise
        except RuntimeError as error:  # of torch.distributed: a connection broke
            if self.watch is not None:
                self.watch.wait_for_word()
                self._raise_if_lost()
            raise RankLost(
                f"rank {self.rank} of {self.size} lost its connection to another rank "
                f"({str(error).splitlines()[0]})"
            ) from None

    def _raise_if_lost(self) -> None:
        lost = None if self.watch is None else self.watch.lost
        if lost is not None:
            told_here = self.rank == (1 if lost.rank == 0 else 0)
            text = _describe(lost, self.size)
            raise RankLost(text, lost.rank, lost.reason, is_told_here=told_here)


def check_ranks(ranks: Any) -> None:
    """Raises a TypeError unless these are `Ranks`, or None."""
    if ranks is not None and not isinstance(ranks, Ranks):
        raise TypeError(
            "ranks must be fmeta.distributed.Ranks, as `with fmeta.distributed.joined() as ranks` "
            f"gives them, or None for this process alone, got {ranks!r}"
        )


def _describe(lost: Lost, size: int) -> str:
    who = f"rank {lost.rank} of {size}" + (f" ({lost.where})" if lost.where else "")
    if lost.reason:
        return f"{who} stopped: {lost.reason}"
    return (
        f"{who} has given no sign of life for {lost.seconds:.0f} seconds: it was killed (out of "
        "memory?), it hangs, or its machine cannot be reached"
    )
