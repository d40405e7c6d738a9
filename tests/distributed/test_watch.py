"""Signs of life: who is missed, and by whom it is told. Threads of one process, one store."""

import time

import pytest
from torch.distributed import HashStore

from fmeta.distributed import RankLost, Ranks
from fmeta.distributed._watch import Lost, Watch


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def watches():
    """Builder of watches on one store, all stopped at the end."""
    store, made = HashStore(), []

    def build(rank, size, patience=0.8):
        made.append(Watch(store, rank, size, patience=patience))
        return made[-1]

    yield build
    for watch in made:
        watch.stop()


def test_a_silent_rank_is_missed_by_all(watches):
    # Rank 2 has never given a sign; rank 1 looks after it, rank 0 reads what rank 1 found.
    first, second = watches(0, 3), watches(1, 3)
    assert until(lambda: first.lost and second.lost)
    assert first.lost == second.lost
    assert (first.lost.rank, first.lost.reason) == (2, "")
    assert first.lost.seconds == pytest.approx(0.8)


def test_ranks_that_live_are_not_missed(watches):
    both = [watches(rank, 2, patience=2.0) for rank in range(2)]
    time.sleep(2.6)
    assert [watch.lost for watch in both] == [None, None]


def test_a_last_word_is_heard_and_the_first_one_counts(watches):
    both = [watches(rank, 2, patience=20.0) for rank in range(2)]
    both[1].say("ValueError: no such task")
    both[0].say("RuntimeError: what followed from it")
    assert until(lambda: both[0].lost)
    assert both[0].lost.rank == 1
    assert both[0].lost.reason == "ValueError: no such task"
    assert both[0].lost.where.startswith("process ")


class _Found:
    """A watch that has found this."""

    def __init__(self, lost):
        self.lost = lost


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (Lost(3, "process 7 on a", "", 20.0), r"rank 3 of 4 \(process 7 on a\) has given no sign"),
        (Lost(0, "", "interrupted", 0.0), "rank 0 of 4 stopped: interrupted"),
    ],
)
def test_one_rank_tells_it(lost, words):
    told = []
    for rank in set(range(4)) - {lost.rank}:
        with pytest.raises(RankLost, match=words) as found:
            Ranks(rank, 4, None, _Found(lost))._raise_if_lost()
        assert (found.value.rank, found.value.reason) == (lost.rank, lost.reason)
        told.append(found.value.is_told_here)
    assert told == [True, False, False]
