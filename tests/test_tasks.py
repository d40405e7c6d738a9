"""Digits and drawn tasks: fixed splits, seeded draws, a pure loss."""

import pytest
import torch
from torch.func import grad, vmap

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
SPLITS = {"train": 1200, "validation": 297, "test": 300}


def images(split, steps=600):
    """Which images are ever in a batch of this split (19,200 draws find nearly all)."""
    batches = digits((5,), batch_size=32).batches({}, fold_in(0), steps, split=split)
    return set(batches.flatten().tolist())


def test_splits_are_disjoint_and_cover_the_digits():
    seen = {split: images(split) for split in SPLITS}
    assert seen["train"].isdisjoint(seen["validation"])
    assert seen["train"].isdisjoint(seen["test"])
    assert seen["validation"].isdisjoint(seen["test"])
    assert {k: len(v) for k, v in seen.items()} == SPLITS
    assert set.union(*seen.values()) == set(range(1797))


def test_the_splits_are_fixed_for_all_time():
    # Held-out images must stay held out from one version, and one family, to the next.
    assert sum(images("test")) == 262760


def test_every_split_holds_all_ten_digits():
    for split in SPLITS:
        labels = FAMILY.data["y"][list(images(split))]
        assert labels.unique().tolist() == list(range(10))


def test_batches_depend_on_the_generator_alone():
    a, b, c = (FAMILY.batches({}, fold_in(0, i), 7) for i in (1, 1, 2))
    assert a.shape == (7, 16)
    assert not a.is_floating_point()
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


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
    assert set(test.batches.flatten().tolist()) <= images("test")


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("widths", [(5,), (5, 4), ()])
def test_the_loss_is_that_of_the_same_network(widths, activation):
    family = digits(widths, activation, batch_size=16)
    task = sample_task(family, 1, 0)
    p, batch = task.model_params, task.batches[0]
    x, last = family.data["x"][batch], len(widths)
    for i in range(last + 1):
        x = x @ p[f"w{i}"] + p[f"b{i}"]
        x = x if i == last else getattr(torch.nn.functional, activation)(x)
    want = -x.log_softmax(-1)[range(16), family.data["y"][batch]].mean()
    torch.testing.assert_close(family.loss(family.data, task.config, p, batch), want)


def test_the_loss_under_vmap_and_grad_equals_one_by_one():
    tasks = [sample_task(FAMILY, 1, 0, i) for i in range(3)]
    both = stack_tasks(tasks)
    loss = lambda p, b: FAMILY.loss(FAMILY.data, {}, p, b)
    got = vmap(grad(loss))(both.model_params, both.batches[:, 0])
    for i, task in enumerate(tasks):
        want = grad(loss)(task.model_params, task.batches[0])
        for k in want:
            torch.testing.assert_close(got[k][i], want[k], rtol=1e-5, atol=1e-6)


def test_untrained_networks_know_nothing():
    loss = [
        FAMILY.loss(FAMILY.data, {}, t.model_params, t.batches[0])
        for t in (sample_task(FAMILY, 1, 0, i) for i in range(20))
    ]
    assert 1.8 < torch.stack(loss).mean().item() < 4.0  # log 10 = 2.3


def test_loss_of_task_takes_the_config_as_an_argument():
    family = TaskFamily(
        torch.tensor(2.0), None, None, None, lambda data, c, p, b: data * c["k"] * p * b
    )
    loss = loss_of_task(family)
    assert loss(torch.tensor(3.0), torch.tensor(5.0), {"k": torch.tensor(7.0)}) == 210


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: digits(activation="swish"), "unknown activation 'swish': there are relu, tanh"),
        (lambda: digits((32, 0)), r"widths\[1\] must be at least 1, got 0"),
        (lambda: digits(batch_size=0), "batch_size must be at least 1, got 0"),
        (
            lambda: FAMILY.batches({}, fold_in(0), 2, split="dev"),
            "unknown split 'dev': there are train, validation, test",
        ),
    ],
)
def test_what_there_is_not_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()


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
