"""Diverged tasks are counted and named."""

import pytest
import torch

from fmeta.meta_train import describe_diverged
from fmeta.meta_train._diverged import diverged_tasks

FLAGS = torch.tensor([False, True, False, True])
AT = torch.tensor([-1, 20, -1, 0])


def test_an_estimator_that_does_not_report_gives_nothing():
    assert diverged_tasks({"losses": torch.ones(3)}) == {}


def test_none_diverged_is_a_share_of_zero():
    assert diverged_tasks({"diverged": torch.zeros(4, dtype=torch.bool)}) == {"diverged": 0.0}


def test_those_that_did_are_named_with_their_inner_steps_and_where_they_came_from():
    drawn = torch.tensor([[9, 4, i] for i in range(4)])
    got = diverged_tasks({"diverged": FLAGS, "diverged_at": AT, "drawn": drawn})
    assert got == {
        "diverged": 0.5,
        "diverged_tasks": [
            {"task": 1, "inner_step": 20, "drawn": [9, 4, 1]},
            {"task": 3, "inner_step": 0, "drawn": [9, 4, 3]},
        ],
    }


def test_in_a_mixture_the_family_is_named():
    family = torch.tensor([0, 0, 1, 1])
    got = diverged_tasks({"diverged": FLAGS, "diverged_at": AT, "family": family})
    assert got["diverged_tasks"] == [
        {"task": 1, "family": 0, "inner_step": 20},
        {"task": 3, "family": 1, "inner_step": 0},
    ]
    assert describe_diverged({"step": 4, **got}) == (
        "outer step 4: 2 of 4 tasks diverged: task 1 of family 0 at inner step 20, "
        "task 3 of family 1 at inner step 0"
    )


@pytest.mark.parametrize("at", [{}, {"diverged_at": torch.tensor([-1, -1, -1, -1])}])
def test_what_is_not_known_is_left_out(at):
    got = diverged_tasks({"diverged": FLAGS, **at})
    assert got["diverged_tasks"] == [{"task": 1}, {"task": 3}]


@pytest.mark.parametrize("share", [{}, {"diverged": 0.0}])
def test_there_is_nothing_to_say_when_none_did(share):
    assert describe_diverged({"step": 0, **share}) == ""


def test_a_sentence_names_a_few():
    flags = torch.ones(7, dtype=torch.bool)
    metrics = {"step": 2, **diverged_tasks({"diverged": flags, "diverged_at": torch.arange(7)})}
    assert describe_diverged(metrics, most=2) == (
        "outer step 2: 7 of 7 tasks diverged: task 0 at inner step 0, task 1 at inner step 1, ..."
    )
