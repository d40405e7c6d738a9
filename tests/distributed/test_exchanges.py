"""Shares, the mean of a tree, what is handed out and compared; alone, nothing is exchanged."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmeta.distributed import (
    Ranks,
    Share,
    all_reduce_mean,
    broadcast_tree,
    check_same,
    dealt,
    joined,
    sum_tree,
)
from fmeta.distributed._packing import pack_rows, unpack_rows


@given(size=st.integers(1, 9), totals=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_shares_are_contiguous_cover_all_and_differ_by_one_at_most(size, totals):
    by_rank = [dealt(Ranks(rank, size), totals) for rank in range(size)]
    for family, total in enumerate(totals):
        indices = [i for shares in by_rank for i in shares[family].own]
        assert indices == list(range(total))
        counts = [len(shares[family].own) for shares in by_rank]
        assert counts == by_rank[0][family].counts
        assert max(counts) - min(counts) <= 1
    load = [sum(len(share.own) for share in shares) for shares in by_rank]
    assert max(load) - min(load) <= 1


def test_tasks_of_a_particle_stay_together():
    shares = [Share(Ranks(rank, 3), 4).times(2) for rank in range(3)]
    assert [list(s.own) for s in shares] == [[0, 1, 2, 3], [4, 5], [6, 7]]


def test_a_rank_without_a_task_works_on_the_first():
    share = Share(Ranks(2, 3), 2)
    assert (list(share.own), list(share.worked_on)) == ([], [0])
    torch.testing.assert_close(share.part(torch.arange(2)), torch.arange(1))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_what_was_packed_comes_back_also_leaves_without_numbers(rows):
    """As the losses of learners that take no inner steps, ``(tasks, 0)``."""
    tree = {
        "none": torch.ones(rows, 0),
        "one each": torch.arange(rows) > 0,
        "several": torch.arange(2.0 * rows, dtype=torch.float64).view(rows, 2, 1),
        "none again": torch.ones(rows, 2, 0, dtype=torch.int64),
    }
    found = unpack_rows(pack_rows(tree), tree)
    torch.testing.assert_close(found, tree, rtol=0, atol=0)


def test_weighted_mean_of_two_ranks(on_two):
    for found in on_two:
        mean = found["mean"]["weighed"]
        assert mean["none"] is None
        torch.testing.assert_close(mean["w"], torch.full((2, 3), 0.75))
        torch.testing.assert_close(mean["half"], torch.full((2,), 0.75, dtype=torch.bfloat16))
        want = torch.tensor(1 / 3 + 0.75, dtype=torch.float64)
        torch.testing.assert_close(mean["double"], want, rtol=1e-15, atol=0)


def test_a_rank_without_tasks_does_not_count_even_when_nan(on_two):
    for found in on_two:
        assert found["mean"]["left out"]["w"].tolist() == [1.0]


def test_a_mean_alone_is_the_tree():
    tree = {"w": torch.tensor([1.0, -2.0], requires_grad=True), "none": None}
    mean = all_reduce_mean(tree, weight=np.int64(3))
    assert mean["w"].tolist() == [1.0, -2.0]
    assert not mean["w"].requires_grad
    assert all_reduce_mean(tree, weight=0)["w"].isnan().all()


def test_a_mean_refuses_what_has_none():
    with pytest.raises(TypeError, match=r"path a is torch.int64, not a floating tensor"):
        all_reduce_mean({"a": torch.tensor(1)})
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        all_reduce_mean({"a": torch.ones(1)}, weight=-1)
    with pytest.raises(TypeError, match="weight must be a number, got '4'"):
        all_reduce_mean({"a": torch.ones(1)}, weight="4")
    with pytest.raises(TypeError, match=r"ranks must be fmeta\.distributed\.Ranks.*got 2"):
        all_reduce_mean({"a": torch.ones(1)}, ranks=2)


@pytest.mark.parametrize(
    ("case", "other", "first"),
    [
        ("shape", r"torch.float32 \(4,\) on cpu", r"torch.float32 \(3,\) on cpu"),
        ("key", "no leaf", r"torch.float32 \(3,\) on cpu"),
        ("further key", r"torch.float32 \(3,\) on cpu", "no leaf"),
        ("dtype", r"torch.int64 \(3,\) on cpu", r"torch.float32 \(3,\) on cpu"),
        ("none", "None", r"torch.float32 \(3,\) on cpu"),
    ],
)
def test_trees_that_are_not_alike_are_named_on_every_rank(on_two, case, other, first):
    for found in on_two:
        said = found["unlike"][case]
        assert re.search(f"at path w rank 1 of 2 has {other}, rank 0 has {first}; give", said)


def test_rank_0s_tree_is_handed_out(on_two):
    for found in on_two:
        tree = found["handed out"]
        assert (tree["n"], tree["none"]) == (0.1, None)
        assert tree["x"].tolist() == tree["again"].tolist() == [0.0, 1.0, 2.0]
        assert tree["wide"].dtype is torch.float64


def test_ranks_that_hold_other_things_are_told(on_two):
    assert {found["same"] for found in on_two} == {on_two[0]["same"]}
    assert on_two[0]["same"].startswith("rank 1 of 2 has trees that differ from rank 0's: give all")


def test_alone_all_is_as_it_was():
    ranks = Ranks.alone()
    tree = {"x": torch.ones(2), "n": 1}
    assert broadcast_tree(tree, ranks) is tree
    assert sum_tree(tree, ranks) is tree
    assert ranks.gather(tree, [2]) is tree
    assert ranks.broadcast_bytes(b"a") == b"a"
    check_same(tree, ranks, "trees")
    ranks.wait_for_all()


def test_ranks_of_no_group():
    with pytest.raises(RuntimeError, match=r"not initialised: use `with fmeta.distributed.joined"):
        Ranks.of_group()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK must be a number, got ''"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
    ],
)
def test_an_environment_that_makes_no_sense(monkeypatch, variables, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words), joined():
        pass
