"""Learning rates: the best one by the validation loss, in a grid that follows it."""

import math

import pytest
import torch

import fmeta
from fmeta import evaluate, optimizers
from fmeta.tasks import loss_of_task, sample_batches, sample_task

STEPS, SEEDS = 10, 3
LENGTHS = {"num_steps": STEPS, "num_seeds": SEEDS, "seed": 5}


def test_tune_picks_the_rate_of_the_lowest_final_loss(quadratics):
    rates = [1e-4, 0.03, 0.3, 3.0]
    got = evaluate.tune(quadratics, optimizers.sgd, rates, **LENGTHS)
    scores = {
        lr: evaluate.final_loss(
            evaluate.compare(
                quadratics, {"a": (optimizers.sgd(lr), {})}, **LENGTHS, held_out="validation"
            )["a"].held_out
        ).mean()
        for lr in rates
    }
    assert got == min(scores, key=scores.get)
    assert isinstance(got, float)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_rate_that_diverges_never_wins(position, quadratics):
    rates = [0.1, 0.2]
    rates.insert(position, 1e300)  # its loss overflows to inf, then NaN
    assert evaluate.tune(quadratics, optimizers.sgd, rates, **LENGTHS) in (0.1, 0.2)


def test_a_rate_whose_loss_becomes_minus_infinity_never_wins(quadratics):
    family = quadratics._replace(loss=lambda data, config, p, b: -(p["w"] ** 2).sum() + 0 * b.sum())
    steep = evaluate.tune(family, optimizers.sgd, [0.1, 1e200], **LENGTHS)
    assert steep == 0.1


def test_rates_that_all_diverge_are_an_error(quadratics):
    with pytest.raises(ValueError, match=r"not finite for any of the rates \[1e\+300\]"):
        evaluate.tune(quadratics, optimizers.sgd, [1e300], **LENGTHS)


def scores_one_by_one(family, rates):
    """Plain unrolls, a rate and a seed at a time, on the stream for tuning."""
    found = []
    for lr in rates:
        losses = []
        for i in range(SEEDS):
            task = sample_task(family, STEPS, 5, i, 1)
            fresh = sample_batches(family, task.config, 8, 5, i, 1, 3, split="validation")
            run = fmeta.unroll(
                optimizers.adam(lr),
                loss_of_task(family),
                {},
                task.model_params,
                task.batches,
                loss_args=(task.config,),
            )
            losses += [family.loss(family.data, task.config, run.params, b) for b in fresh]
        found.append(float(torch.stack(losses).mean()))
    return found


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4])
def test_scores_are_those_of_plain_unrolls(quadratics, chunk_size):
    rates = [0.01, 0.1, 1.0]
    found = evaluate.search_rates(
        quadratics,
        optimizers.adam,
        rates,
        **LENGTHS,
        refine=False,
        extend=False,
        chunk_size=chunk_size,
    )
    assert found.rates == tuple(rates)
    assert found.scores == pytest.approx(scores_one_by_one(quadratics, rates), rel=1e-5)
    assert found.rate == rates[found.scores.index(min(found.scores))]


@pytest.mark.parametrize("rates", [(1e-4, 1e-3), (3.0, 30.0)], ids=["too low", "too high"])
def test_a_grid_follows_the_best_rate(quadratics, rates):
    found = evaluate.search_rates(quadratics, optimizers.adam, rates, **LENGTHS)
    assert found.extended > 0
    assert not found.at_edge
    assert set(rates) < set(found.rates)
    assert list(found.rates) == sorted(found.rates)


def test_an_edge_that_is_not_left_is_told(quadratics):
    options = {"extend": False, "refine": False}
    found = evaluate.search_rates(quadratics, optimizers.adam, (1e-4, 1e-3), **LENGTHS, **options)
    assert found.rate == 1e-3
    assert found.at_edge
    assert found.extended == 0


def test_refinement_tries_the_rates_half_way_to_both_neighbours(quadratics):
    rates = (0.01, 0.1, 1.0)
    coarse = evaluate.search_rates(quadratics, optimizers.adam, rates, **LENGTHS, refine=False)
    fine = evaluate.search_rates(quadratics, optimizers.adam, rates, **LENGTHS)
    new = sorted(set(fine.rates) - set(coarse.rates))
    assert new == pytest.approx([coarse.rate / 10**0.5, coarse.rate * 10**0.5])
    assert min(fine.scores) <= min(coarse.scores)


def test_a_single_rate_has_neither_edges_nor_neighbours(quadratics):
    found = evaluate.search_rates(quadratics, optimizers.adam, [0.1], **LENGTHS)
    assert (found.rate, found.rates, found.extended) == (0.1, (0.1,), 0)
    assert not found.at_edge


@pytest.mark.parametrize("rates", [[], [0.0, 0.1], [-1.0], [math.nan]])
def test_rates_that_cannot_be_meant_are_an_error(quadratics, rates):
    with pytest.raises(ValueError, match="rates must be positive numbers, at least one"):
        evaluate.search_rates(quadratics, optimizers.adam, rates, **LENGTHS)


@pytest.mark.parametrize("seed", range(6))
def test_one_diverged_seed_is_enough_for_an_infinite_score(cliffs, seed):
    lengths = {"num_steps": STEPS, "num_seeds": 2, "seed": seed, "extend": False, "refine": False}
    steep = [float(sample_task(cliffs, 1, seed, i, 1).config["scale"]) > 1 for i in range(2)]
    if any(steep):
        with pytest.raises(ValueError, match="not finite for any of the rates"):
            evaluate.search_rates(cliffs, optimizers.sgd, (0.1, 0.2), **lengths)
    else:
        found = evaluate.search_rates(cliffs, optimizers.sgd, (0.1, 0.2), **lengths)
        assert all(map(math.isfinite, found.scores))
