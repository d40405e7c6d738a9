"""Horizon schedules: plain functions of a generator and the estimate, drawn for each training."""

import math

import pytest
import torch

import fmeta
from fmeta import estimators, optimizers, trees
from fmeta.estimators import constant, growing, log_uniform
from fmeta.estimators._draws import Draws
from fmeta.estimators._horizons import as_horizon
from fmeta.estimators._trainings import Trainings
from fmeta.random import fold_in
from fmeta.tasks import quadratic

FAMILY = quadratic()
RULE = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.01)


def horizons_of(schedule, estimates, *, num_tasks=3, truncation=4, **options):
    """The horizon of every training that the estimates begin, with its integers."""
    draws = Draws(FAMILY, num_tasks, schedule, truncation, None, False, **options)
    first = draws.first(0, None)
    now = Trainings(
        (), (), first.config, first.horizon, first.horizon, torch.zeros(num_tasks, 4).long()
    )
    found = {}
    for step in range(estimates):
        plan = draws.plan(0, step, now, None)
        for k, i in plan.is_new.nonzero().tolist():
            found[tuple(plan.drawn[k, i].tolist())] = int(plan.horizon[k, i])
        now = now._replace(t=plan.t[-1] + 1, horizon=plan.horizon[-1], drawn=plan.drawn[-1])
    return found


def test_a_number_several_and_schedules_are_one_thing():
    generator = fold_in(0, 1)
    assert as_horizon(7)(generator, 0) == constant(7)(generator, 0) == 7
    assert {as_horizon((3, 5))(fold_in(0, i), 0) for i in range(20)} == {3, 5}
    assert as_horizon(lambda generator, estimate: 2 + estimate)(generator, 3) == 5


def test_log_uniform_gives_every_doubling_the_same_share():
    generator = fold_in(0, 1)
    drawn = torch.tensor([log_uniform(4, 63)(generator, 0) for _ in range(4000)])
    assert int(drawn.min()) == 4
    assert int(drawn.max()) == 63
    for low in (4, 8, 16, 32):
        share = ((drawn >= low) & (drawn < 2 * low)).double().mean()
        assert abs(float(share) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    four = (drawn == 4).double().mean()  # its own: log(5 / 4) of log 16
    assert abs(float(four) - math.log(5 / 4) / math.log(16)) < 4 * math.sqrt(0.08 / 4000)


def test_log_uniform_of_one_number_is_constant():
    assert {log_uniform(9, 9)(fold_in(0, i), 0) for i in range(20)} == {9}


def test_growing_depends_on_the_estimate_only():
    schedule = growing(4, 24, num_steps=10)
    assert [schedule(None, k) for k in (0, 5, 10, 11)] == [4, 14, 24, 24]
    assert growing(24, 4, num_steps=10)(None, 5) == 14
    for (_, estimate, _, _), horizon in horizons_of(schedule, 14).items():
        assert horizon == schedule(None, estimate)


def test_each_training_has_a_horizon_of_its_own_however_many_there_are():
    schedule = log_uniform(2, 30)
    few, many = (horizons_of(schedule, 20, num_tasks=n) for n in (2, 5))
    assert len(set(few.values())) > 4
    assert few == {name: n for name, n in many.items() if name[2] < 2}


def test_neighbours_together_are_given_the_same():
    found = horizons_of(log_uniform(2, 30), 10, num_tasks=6, together=3)
    by_start = {}
    for (_, estimate, i, start), horizon in found.items():
        by_start.setdefault((estimate, i // 3, start), []).append(horizon)
    assert all(len(set(v)) == 1 and len(v) == 3 for v in by_start.values())
    assert len({v[0] for v in by_start.values()}) > 3


@pytest.mark.parametrize("schedule", [constant(6), log_uniform(2, 9), growing(2, 8, 3)], ids=repr)
@pytest.mark.parametrize("name", ["truncated", "pes"])
def test_estimators_take_schedules_and_go_on_from_their_state(name, schedule):
    build = getattr(estimators, name)
    options = {"num_tasks": 3, "horizon": schedule, "truncation": 4}
    state = build(RULE, FAMILY, **options).init(RULE.init(), 1)
    for _ in range(3):
        found, after = build(RULE, FAMILY, **options).estimate(RULE.init(), state)
        assert found.loss.isfinite()
        again, _ = build(RULE, FAMILY, **options).estimate(RULE.init(), state)
        assert all(map(torch.equal, trees.leaves(found), trees.leaves(again)))
        state = after


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(0), "horizon must be at least 1, got 0"),
        (lambda: log_uniform(0, 5), "low must be at least 1, got 0"),
        (lambda: log_uniform(7, 5), "low must not be above high, got 7 and 5"),
        (lambda: log_uniform(1.5, 5), "low must be an integer"),
        (lambda: growing(1, 5, 0), "num_steps must be at least 1"),
        (lambda: as_horizon(True), "horizon must be an integer, got True"),
        (lambda: as_horizon(()), "horizon is empty"),
        (lambda: as_horizon((5, 0)), "horizon must be at least 1, got 0"),
        (lambda: as_horizon(2.5), "or a schedule"),
        (lambda: as_horizon("long"), "or a schedule"),
        (lambda: as_horizon(lambda g, k: 0)(None, 3), "returned 0 in estimate 3"),
        (lambda: as_horizon(lambda g, k: 2.0)(None, 3), "must return a positive integer"),
    ],
    ids=range(12),
)
def test_wrong_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
