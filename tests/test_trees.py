"""Trees: None is a leaf, dicts match by key, mismatches are named by path."""

from typing import NamedTuple

import pytest
import torch

from fmeta import trees


class Pair(NamedTuple):
    first: object
    second: object


TREE = {"z": [torch.ones(2), None], "a": Pair(torch.zeros(3), (torch.ones(()),))}


def test_flatten_and_unflatten_give_the_tree_back():
    flat, spec = trees.flatten(TREE)
    again = trees.unflatten(spec, flat)
    assert isinstance(again["a"], Pair)
    assert [x is y for x, y in zip(trees.leaves(again), flat, strict=True)] == [True] * 4


def test_none_is_a_leaf():
    assert trees.leaves({"a": None, "b": (None,)}) == [None, None]
    assert trees.paths({"a": None, "b": (None,)}) == ["a", "b/0"]


def test_paths_are_written_with_slashes_in_sorted_key_order():
    assert trees.paths(TREE) == ["a/first", "a/second/0", "z/0", "z/1"]
    assert trees.paths(torch.ones(1)) == ["<root>"]


def test_dicts_are_matched_by_key_whatever_their_order():
    got = trees.map(lambda a, b: a - b, {"x": 5, "y": 7}, {"y": 1, "x": 2})
    assert got == {"x": 3, "y": 6}


def test_map_sees_what_stands_at_a_leaf():
    got = trees.map(lambda p, state: (p, state["m"]), {"w": 1}, {"w": {"m": 2}})
    assert got == {"w": (1, 2)}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"a": 1}, "path b is missing"),
        ({"a": 1, "b": 2, "c": 3}, "path c is not in the parameters"),
        ({"a": 1, "b2": 2}, "path b is missing; path b2 is not in the parameters"),
    ],
)
def test_map_names_the_path_that_does_not_match(other, words):
    with pytest.raises(ValueError, match=words):
        trees.map(lambda a, b: a, {"a": 1, "b": 2}, other)


def test_match_names_path_and_both_shapes():
    with pytest.raises(ValueError, match=r"the gradient at path n/0 has shape \(2,\).*\(3,\)"):
        trees.match({"n": [torch.ones(3)]}, {"n": [torch.ones(2)]}, "the gradient")


@pytest.mark.parametrize(
    ("leaf", "words"), [(None, "is None"), (1.0, "is a float"), ("x", "is a str")]
)
def test_match_names_what_is_no_tensor(leaf, words):
    with pytest.raises(ValueError, match=f"the gradient at path w {words}"):
        trees.match({"w": torch.ones(1)}, {"w": leaf}, "the gradient", allow_none=False)


def test_match_allows_none_where_told():
    assert trees.match({"w": torch.ones(1)}, {"w": None}, "the gradient") == [None]


def test_match_names_a_tree_of_another_kind():
    with pytest.raises(ValueError, match="the gradient is not shaped like the parameters"):
        trees.match({"w": torch.ones(1)}, [torch.ones(1)], "the gradient")


def test_a_mix_of_devices_is_named_by_both_paths():
    tree = {"a": torch.ones(1), "b": [torch.ones(1, device="meta")]}
    with pytest.raises(ValueError, match="mix devices: a is on cpu, b/0 on meta"):
        trees.common_device(tree)


def test_common_device_of_a_tree_without_tensors_is_none():
    assert trees.common_device({"a": None}) is None
    assert trees.common_device({"a": torch.ones(1)}) == torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_compute_dtype_is_at_least_float32(dtype, computed):
    assert trees.compute_dtype(torch.ones(1, dtype=dtype)) is computed


def test_cast_leaves_integers_and_numbers_alone():
    tree = {"f": torch.ones(1), "i": torch.arange(2), "n": 0.1, "none": None}
    got = trees.cast(tree, torch.float64)
    assert got["f"].dtype is torch.float64
    assert got["i"] is tree["i"]
    assert got["n"] == 0.1
    assert got["none"] is None


def test_shape_classes_stack_small_leaves_of_one_shape_and_dtype():
    small, wide = torch.ones(2), torch.ones(2, dtype=torch.float64)
    leaves = [small, torch.ones(9), wide, None, small, torch.ones(9), small, wide]
    groups = trees.shape_classes(leaves, max_numel=4, min_size=3, total=100)
    assert sorted(groups) == [[0, 4, 6], [1], [2], [5], [7]]


def test_shape_classes_are_of_about_equal_and_bounded_size():
    groups = trees.shape_classes([torch.ones(2)] * 10, max_numel=4, min_size=2, total=8)
    assert [len(g) for g in groups] == [4, 4, 2]
    assert sorted(i for g in groups for i in g) == list(range(10))
    empty = trees.shape_classes([torch.ones(0)] * 3, max_numel=4, min_size=2, total=8)
    assert empty == [[0, 1, 2]]
