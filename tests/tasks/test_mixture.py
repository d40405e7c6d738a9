"""Mixtures: shares of sum one, and what is no mixture is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmeta.tasks import Mixture, digits, mixture, quadratic

FAMILIES = [quadratic(2), quadratic(3), digits((4,))]


@given(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3))
def test_weights_are_shares_in_proportion(weights):
    got = mixture(FAMILIES, weights)
    assert isinstance(got, Mixture)
    assert got.families == tuple(FAMILIES)
    assert sum(got.weights) == pytest.approx(1)
    assert [w * sum(weights) for w in got.weights] == pytest.approx(weights)


def test_without_weights_shares_are_equal():
    assert mixture(FAMILIES).weights == pytest.approx((1 / 3,) * 3)


@pytest.mark.parametrize(
    ("families", "weights", "error", "words"),
    [
        ([], None, ValueError, "at least one family, got none"),
        (FAMILIES, (1, 2), ValueError, "2 weights for 3 families: give one for each"),
        (FAMILIES, (1, 0, 1), ValueError, r"weights\[1\] must be positive and finite, got 0.0"),
        (FAMILIES, (1, 1, math.nan), ValueError, r"weights\[2\] must be positive"),
        (FAMILIES, (1, math.inf, 1), ValueError, r"weights\[1\] must be positive"),
        (
            [FAMILIES[0], "digits"],
            None,
            TypeError,
            r"families\[1\] must be a TaskFamily, got a str",
        ),
    ],
)
def test_what_is_no_mixture_is_refused(families, weights, error, words):
    with pytest.raises(error, match=words):
        mixture(families, weights)
