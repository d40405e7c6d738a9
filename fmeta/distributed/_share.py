"""Which of the tasks (or particles) of an estimate are this process's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fmeta import trees
from fmeta.distributed._ranks import Ranks

__all__ = ["Share", "dealt"]

Tree = Any


@dataclasses.dataclass(frozen=True)
class Share:
    """A contiguous part of ``total`` indices; the parts of all ranks differ by one at most.

    A rank without an index of its own works on a copy of index 0 and gives nothing: so it knows
    shapes and dtypes, and it would only have waited.

    Args:
        ranks: who shares.
        total: number of indices.
        first: rank from which on those that are left over are dealt out, one each.
        each: neighbours that stay together (the tasks of a particle).

    Example:
        >>> [list(Share(Ranks(rank, 3), 7).own) for rank in range(3)]
        [[0, 1, 2], [3, 4], [5, 6]]
    """

    ranks: Ranks
    total: int
    first: int = 0
    each: int = 1

    @property
    def counts(self) -> list[int]:
        """How many indices each rank has."""
        size = self.ranks.size
        whole, over = divmod(self.total // self.each, size)
        return [self.each * (whole + ((r - self.first) % size < over)) for r in range(size)]

    @property
    def own(self) -> range:
        """The indices that this rank gives."""
        counts = self.counts
        low = sum(counts[: self.ranks.rank])
        return range(low, low + counts[self.ranks.rank])

    @property
    def worked_on(self) -> range:
        """The indices that this rank works on, at least ``each``."""
        return self.own or range(self.each)

    def gather(self, rows: Tree, *, to_first: bool = False) -> Tree:
        """``(len(worked_on), ...)`` of each rank as ``(total, ...)``, in order of the index."""
        if self.ranks.size == 1:
            return rows
        mine = trees.map(lambda x: x[: len(self.own)], rows)
        return self.ranks.gather(mine, self.counts, to_first=to_first)

    def part(self, rows: Tree) -> Tree:
        """``(total, ...)`` as this rank's ``(len(worked_on), ...)``."""
        if self.ranks.size == 1:
            return rows
        mine = self.worked_on
        return trees.map(lambda x: x[mine.start : mine.stop], rows)

    def times(self, each: int) -> Share:
        """The share in ``each`` tasks for every index, which stay together."""
        return Share(self.ranks, self.total * each, self.first, self.each * each)


def dealt(ranks: Ranks, totals: Sequence[int]) -> list[Share]:
    """A share in each of several families, so that all ranks have about the same work.

    Each family is spread over all ranks, whatever its tasks cost; what is left over of one is dealt
    out from the rank after that where the one before ended.
    """
    firsts = [sum(totals[:i]) % ranks.size for i in range(len(totals))]
    return [Share(ranks, n, first) for n, first in zip(totals, firsts, strict=True)]
