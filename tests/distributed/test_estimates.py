"""An estimate is the same on any number of ranks, and what they exchange does not grow with it."""

import pytest
import torch

from fmeta.distributed import Ranks

SUMMED_ON_FOUR = "pes, two tasks a particle"


def close(got, want, tolerance=1e-9):
    assert list(got) == list(want)
    for path, x in want.items():
        torch.testing.assert_close(
            got[path],
            x,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, path=path: f"{path}: {m}",
        )


@pytest.fixture(scope="module")
def alone(jobs):
    return {name: jobs.estimates(name, Ranks.alone()) for name in jobs.ESTIMATORS}


def test_two_ranks_give_what_one_does(alone, on_two):
    for name, want in alone.items():
        close(on_two[0]["estimates"][name]["estimates"], want["estimates"])
        close(on_two[0]["estimates"][name]["state"], want["state"])
    some = torch.cat(
        [x for w in alone.values() for p, x in w["estimates"].items() if "diverged" in p]
    )
    assert some.any()  # tasks that diverge are among them


def test_four_ranks_give_what_one_does_also_those_without_a_task(jobs, start, tmp_path):
    found = start("some_estimates", tmp_path, 4).results()
    for name in (*jobs.SOME, "summed"):
        want = jobs.estimates(SUMMED_ON_FOUR if name == "summed" else name, Ranks.alone(), 3)
        close(found[0][name]["estimates"], want["estimates"])
        close(found[0][name]["state"], want["state"])
        for other in found[1:]:
            close(other[name]["estimates"], found[0][name]["estimates"], 0)


def test_evolution_strategies_that_exchange_gradients_give_the_same(jobs, alone, on_two):
    for name in jobs.SUMMED:
        for found in on_two:
            close(found["summed"][name]["estimates"], alone[name]["estimates"])
        close(on_two[0]["summed"][name]["state"], alone[name]["state"])


def test_ranks_hold_the_same_bit_for_bit(on_two):
    for name, want in on_two[0]["estimates"].items():
        close(on_two[1]["estimates"][name]["estimates"], want["estimates"], 0)


def test_a_learned_rule_in_float32_to_1e_6_of_its_norm(jobs, on_two):
    for name, one in jobs.float32_estimates(Ranks.alone()).items():
        want, got = jobs.by_path(one), jobs.by_path(on_two[0]["float32"][name])
        apart, norm = (
            torch.cat([x.double().flatten() for x in xs]).norm()
            for xs in ([got[p] - x for p, x in want.items()], want.values())
        )
        assert apart <= 1e-6 * norm, name


def test_evolution_strategies_exchange_scalars_and_gradients_one_sum(on_two):
    few, many = on_two[0]["traffic"][10], on_two[0]["traffic"][1000]
    assert few["pes"] == many["pes"]
    kinds = [text.split()[0] for text in many["full"]]
    assert kinds == ["all_reduce", "all_gather"]
    reduced = [int(found["full"][0].split()[1]) for found in (few, many)]
    assert reduced == [4 * (10 + 2), 4 * (1000 + 2)]  # the weights, a rate, the number of tasks


def test_a_policy_exchanges_its_returns_one_sum_and_numbers_of_tasks(on_two):
    found = [on_two[0]["traffic"][width]["score_function"] for width in (10, 1000)]
    assert [[text.split()[0] for text in one] for one in found] == 2 * [
        ["all_gather", "all_reduce", "all_gather"]
    ]
    sent = [[int(text.split()[1]) for text in one] for one in found]
    returns, numbers = 2 * 4 * 2 * 8, 2 * 49  # of two tasks: losses and returns of four steps
    assert sent == [[returns, 4 * (width + 2), numbers] for width in (10, 1000)]


def test_baselines_know_the_tasks_of_all_ranks(alone, on_two):
    """So that the next estimate does not depend on who made which task."""
    names = {"score function": "mean", "score function, learned baseline": "moment"}
    for name, known in names.items():
        path = f"baseline/{known}"
        want = alone[name]["state"][path]
        assert want.any()
        for found in on_two:
            close({path: found["estimates"][name]["state"][path]}, {path: want})


def test_maml_on_two_ranks_gives_what_one_does(jobs, on_two):
    want = jobs.few_shot(Ranks.alone())
    for found in on_two:
        close(found["few-shot"], want, 1e-6)


def test_learners_without_steps_give_on_two_ranks_what_they_do_on_one(jobs, on_two):
    want = jobs.without_steps(Ranks.alone())
    for found in on_two:
        close(found["without steps"], want, 1e-5)
