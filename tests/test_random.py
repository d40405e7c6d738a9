"""One generator for each use, from a seed and integers."""

import itertools

import pytest
import torch

from fmeta.random import fold_in, own


def draw(*ints):
    return tuple(torch.rand(4, generator=fold_in(*ints), dtype=torch.float64).tolist())


def test_the_same_integers_give_the_same_numbers():
    assert draw(3, 1, 4) == draw(3, 1, 4)


def test_the_numbers_are_fixed_for_all_time():
    # A checkpoint resumes, and a published run repeats, only while these stay as they are.
    assert torch.randint(1000, (4,), generator=fold_in(0, 1)).tolist() == [66, 399, 480, 126]


def test_every_integer_and_their_order_count():
    ints = [t for n in (1, 2, 3) for t in itertools.product((-1, 0, 1, 2, 2**40), repeat=n)]
    assert len({draw(*t) for t in ints}) == len(ints)


def test_the_whole_range_of_64_bits_is_taken():
    assert draw(2**63 - 1, -(2**63)) != draw(-(2**63), 2**63 - 1)


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    fold_in(0, 1)
    own(None)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("value", [1.0, True, None, torch.tensor(1), "1"])
def test_only_python_integers_are_taken(value):
    with pytest.raises(TypeError, match="fold_in takes Python integers"):
        fold_in(0, value)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_integers_beyond_64_bits_are_refused(value):
    with pytest.raises(ValueError, match="64 bits"):
        fold_in(value)


def test_init_without_a_generator_is_that_of_seed_0():
    generator = torch.Generator().manual_seed(0)
    assert torch.rand((), generator=own(None)) == torch.rand((), generator=generator)
    assert own(generator) is generator
