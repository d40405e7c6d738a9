"""Digits: fixed splits, batches of indices, images as they are and freshly transformed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fmeta.random import fold_in
from fmeta.tasks import digits, sample_task
from fmeta.tasks._digits_data import VERSIONS, images, moved, online_images

FAMILY = digits((5,), batch_size=16)
ONLINE = digits((5,), batch_size=16, online=True)
SPLITS = {"train": 1200, "validation": 297, "test": 300}


def ever_in(split, steps=600):
    """Which images are ever in a batch of this split (19,200 draws find nearly all)."""
    batches = digits((5,), batch_size=32).batches({}, fold_in(0), steps, split=split)
    return set(batches.flatten().tolist())


def test_splits_are_disjoint_and_cover_the_digits():
    seen = {split: ever_in(split) for split in SPLITS}
    assert seen["train"].isdisjoint(seen["validation"])
    assert seen["train"].isdisjoint(seen["test"])
    assert seen["validation"].isdisjoint(seen["test"])
    assert {k: len(v) for k, v in seen.items()} == SPLITS
    assert set.union(*seen.values()) == set(range(1797))


def test_the_splits_are_fixed_for_all_time():
    # Held-out images must stay held out from one version, and one family, to the next.
    assert sum(ever_in("test")) == 262760


def test_every_split_holds_all_ten_digits():
    for split in SPLITS:
        labels = FAMILY.data["y"][list(ever_in(split))]
        assert labels.unique().tolist() == list(range(10))


@given(steps=st.integers(0, 5), size=st.integers(1, 40), split=st.sampled_from(list(SPLITS)))
def test_batches_are_integers_of_the_split(steps, size, split):
    allowed = ever_in(split)
    plain = digits((5,), batch_size=size).batches({}, fold_in(1), steps, split=split)
    online = digits((5,), batch_size=size, online=True).batches({}, fold_in(1), steps, split=split)
    assert plain.shape == (steps, size)
    assert online.shape == (steps, size, 2)
    assert plain.dtype == online.dtype == torch.int64
    assert set(plain.flatten().tolist()) <= allowed
    assert set((online[..., 0] // VERSIONS).flatten().tolist()) <= allowed


def test_batches_depend_on_the_generator_alone():
    a, b, c = (FAMILY.batches({}, fold_in(0, i), 7) for i in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_images_are_moved_as_said():
    x, zero = torch.rand(1, 64, generator=fold_in(0)), torch.zeros(1)
    before = x.view(8, 8)

    def after(angle, left, up):
        return moved(x, zero + angle, zero + left, zero + up).view(8, 8)

    torch.testing.assert_close(after(0, 0, 0), before)
    torch.testing.assert_close(after(0, 1, 0)[:, :-1], before[:, 1:])
    assert not after(0, 1, 0)[:, -1].any()  # black comes in
    torch.testing.assert_close(after(0, 0, -1)[1:], before[:-1])
    half = (before[:, :-1] + before[:, 1:]) / 2
    torch.testing.assert_close(after(0, 0.5, 0)[:, :-1], half)
    torch.testing.assert_close(after(math.pi / 2, 0, 0), torch.rot90(before))


def test_the_versions_of_an_image_are_all_different_and_like_it():
    versions = online_images()["x"].view(1797, VERSIONS, 64)
    plain = images()["x"]
    assert not (versions[:, 1:] == versions[:, :1]).all(-1).any()
    middle = F.normalize(versions.mean(1) - versions.mean(), dim=-1)
    likeness = middle @ F.normalize(plain - plain.mean(), dim=-1).T
    assert (likeness.diagonal() > likeness.median(1).values).all()


def test_noise_has_its_standard_deviation():
    noise = online_images()["noise"]
    assert abs(float(noise.mean())) < 0.005
    assert abs(float(noise.std()) - 0.3) < 0.005


def test_transformed_images_are_made_once_and_are_the_same_again():
    assert ONLINE.data["x"] is digits((7,), online=True).data["x"]
    again = online_images.__wrapped__()
    assert all(torch.equal(again[k], x) for k, x in online_images().items())


def test_an_online_batch_is_fresh():
    batches = digits((5,), online=True).batches({}, fold_in(0), 100)
    seen = batches.flatten(0, 1)
    assert len(seen.unique(dim=0)) == len(seen)


@pytest.mark.parametrize("family", [FAMILY, ONLINE], ids=["plain", "online"])
def test_loss_and_accuracy_are_of_what_the_batch_points_at(family):
    task = sample_task(family, 1, 0)
    p, batch = task.model_params, task.batches[0]
    if family is ONLINE:
        x = torch.stack(
            [family.data["x"][r] + family.data["noise"][o : o + 64] for r, o in batch.tolist()]
        )
        y = family.data["y"][batch[:, 0] // VERSIONS]
    else:
        x, y = family.data["x"][batch], family.data["y"][batch]
    logits = (x @ p["w0"] + p["b0"]).relu() @ p["w1"] + p["b1"]
    arguments = (family.data, task.config, p, batch)
    torch.testing.assert_close(family.loss(*arguments), F.cross_entropy(logits, y))
    right = sum(int(a) == int(b) for a, b in zip(logits.argmax(1), y, strict=True))
    assert float(family.metrics(*arguments)["accuracy"]) == pytest.approx(right / 16)


@pytest.mark.parametrize("online", [False, True])
def test_an_autoencoder_is_to_find_the_image_without_noise(online):
    family = digits((6, 3), "tanh", batch_size=16, model="autoencoder", online=online)
    task = sample_task(family, 1, 0)
    p, batch = task.model_params, task.batches[0]
    assert [p[f"w{i}"].shape[1] for i in range(4)] == [6, 3, 6, 64]
    clean = x = family.data["x"][batch[:, 0] if online else batch]
    if online:
        x = clean + torch.stack([family.data["noise"][o : o + 64] for o in batch[:, 1].tolist()])
    for i in range(4):
        x = x @ p[f"w{i}"] + p[f"b{i}"]
        x = x.tanh() if i < 3 else x
    loss = family.loss(family.data, task.config, p, batch)
    torch.testing.assert_close(loss, (x - clean).square().mean())
    assert family.metrics is None


def test_untrained_networks_know_nothing():
    loss = [
        FAMILY.loss(FAMILY.data, {}, t.model_params, t.batches[0])
        for t in (sample_task(FAMILY, 1, 0, i) for i in range(20))
    ]
    assert 1.8 < torch.stack(loss).mean().item() < 4.0  # log 10 = 2.3


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
        (lambda: ONLINE.batches({}, fold_in(0), 2, split="dev"), "unknown split 'dev'"),
        (lambda: digits(model="rnn"), "unknown model 'rnn': there are mlp, cnn, autoencoder"),
        (lambda: digits((), model="cnn"), "widths is empty: a 'cnn' needs at least one"),
        (lambda: digits((8, 4), model="transformer"), r"one even width, as .* got \(8, 4\)"),
        (lambda: digits((7,), model="transformer"), r"one even width, as .* got \(7,\)"),
    ],
)
def test_what_there_is_not_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()
