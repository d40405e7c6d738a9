"""Numbers over seeds: honest intervals, and what a diverged seed does to them."""

import math

import pytest
import torch
from scipy import stats

from fmeta import evaluate
from fmeta.evaluate._statistics import paired, summarize
from fmeta.random import fold_in

DOUBLE = {"dtype": torch.float64}


def test_final_loss_is_the_mean_of_the_last_tenth():
    losses = torch.arange(40.0).reshape(2, 20)
    assert evaluate.final_loss(losses).tolist() == [18.5, 38.5]
    assert evaluate.final_loss(losses[:, :5]).tolist() == [4.0, 24.0]


@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_paired_interval_is_scipys(n):
    a = torch.randn(n, generator=fold_in(0), **DOUBLE)
    b = a + 0.1 * torch.randn(n, generator=fold_in(1), **DOUBLE) + 0.05
    mean, low, high = evaluate.paired_difference(a, b)
    want = stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval(0.95)
    assert (low, high) == pytest.approx(tuple(want))
    assert mean == pytest.approx((a - b).mean().item())


def test_a_paired_interval_needs_two_seeds():
    with pytest.raises(ValueError, match="at least two seeds"):
        evaluate.paired_difference(torch.ones(1), torch.ones(1))


def test_a_summary_has_the_interval_of_the_mean_and_the_median():
    values = torch.randn(9, generator=fold_in(3), **DOUBLE)
    mean, low, high, median = summarize(values)
    want = stats.t.interval(0.95, 8, loc=mean, scale=stats.sem(values.numpy()))
    assert (low, high) == pytest.approx(want)
    assert (mean, median) == pytest.approx((values.mean().item(), values.median().item()))


def test_a_diverged_seed_makes_the_mean_infinite_and_leaves_the_median():
    found = summarize(torch.tensor([1.0, math.inf, 2.0]))
    assert found.mean == math.inf
    assert math.isnan(found.low)
    assert found.median == 2.0
    pair = paired(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, math.inf, 1.0]))
    assert math.isnan(pair.low)
    assert pair.share_below == pytest.approx(2 / 3)


def by_definition(losses, level):
    for t in range(1, len(losses) + 1):
        if evaluate.final_loss(losses[:t]) <= level:
            return t
    return math.inf


@pytest.mark.parametrize("level", [2.5, 1.2, 0.9, -1.0])
def test_steps_to_a_level_are_the_first_whose_final_loss_is_there(level):
    t = torch.arange(1, 61, **DOUBLE)
    noise = torch.randn(4, 60, generator=fold_in(4), **DOUBLE)
    losses = 1 + 3 / t + 0.1 * noise
    got = evaluate.steps_to_reach(losses, level)
    assert got.tolist() == [by_definition(row, level) for row in losses]


def test_a_level_is_not_reached_after_a_loss_that_is_not_finite():
    losses = torch.tensor([[3.0, math.nan, 1.0], [3.0, 1.0, math.inf]])
    assert evaluate.steps_to_reach(losses, 2.0).tolist() == [math.inf, 2.0]
