"""Drawn tasks: functions of their integers, one stream a split, stacked for vmap."""

import pytest
import torch

from fmeta.random import fold_in
from fmeta.tasks import (
    TaskFamily,
    digits,
    loss_of_task,
    sample_batches,
    sample_task,
    stack_tasks,
)

FAMILY = digits((5,), batch_size=16)
SPLITS = ("train", "validation", "test")


def test_a_task_is_a_function_of_its_integers():
    before = torch.get_rng_state()
    one, two = sample_task(FAMILY, 3, 0, 4, 2), sample_task(FAMILY, 3, 0, 4, 2)
    other = sample_task(FAMILY, 3, 0, 4, 3)
    assert all(torch.equal(one.model_params[k], two.model_params[k]) for k in one.model_params)
    assert torch.equal(one.batches, two.batches)
    assert not torch.equal(one.model_params["w0"], other.model_params["w0"])
    assert torch.equal(before, torch.get_rng_state())


def test_the_split_changes_the_batches_only():
    train, test = (sample_task(FAMILY, 3, 0, 1, split=s) for s in ("train", "test"))
    assert torch.equal(train.model_params["w0"], test.model_params["w0"])
    assert not torch.equal(train.batches, test.batches)


def test_loss_of_task_takes_the_config_as_an_argument():
    family = TaskFamily(
        torch.tensor(2.0), None, None, None, lambda data, c, p, b: data * c["k"] * p * b
    )
    loss = loss_of_task(family)
    assert loss(torch.tensor(3.0), torch.tensor(5.0), {"k": torch.tensor(7.0)}) == 210


def test_metrics_may_be_left_out():
    assert TaskFamily((), None, None, None, None).metrics is None


def test_each_split_has_a_stream_of_its_own():
    # The same ranks in two splits would couple what is held out to what is trained on.
    plain = lambda config, generator, steps, split="train": torch.rand(steps, generator=generator)
    family = FAMILY._replace(batches=plain)
    drawn = [sample_task(family, 50, 0, 1, split=s).batches for s in SPLITS]
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(drawn[0], torch.rand(50, generator=fold_in(0, 1, 2)))  # as it ever was


@pytest.mark.parametrize("split", SPLITS)
def test_batches_alone_are_those_of_the_task(split):
    task = sample_task(FAMILY, 3, 0, 4, split=split)
    called = []
    spied = FAMILY._replace(sample=called.append, init=lambda *a: called.append(a))
    got = sample_batches(spied, task.config, 3, 0, 4, split=split)
    assert torch.equal(got, task.batches)
    assert not called


def test_stacked_tasks_go_to_a_device():
    drawn = [sample_task(FAMILY, 2, 0, i) for i in range(3)]
    moved = stack_tasks(drawn, torch.device("meta"))
    assert moved.model_params["w0"].device.type == moved.batches.device.type == "meta"
    assert stack_tasks(drawn).batches.device.type == "cpu"
