"""Logistic and robust regression, small nets: what their points are, and losses written out."""

import math

import pytest
import torch

from fmeta.random import fold_in
from fmeta.tasks import logistic_regression, robust_regression, sample_task, small_net
from fmeta.tasks._clusters import balanced_labels, gaussian_points

ALL = {"logistic": logistic_regression, "robust": robust_regression, "net": small_net}


@pytest.mark.parametrize("name", ALL)
def test_splits_have_points_of_their_own(name):
    family = ALL[name](points=12)
    config = family.sample(fold_in(0))
    assert all(len(x) == 36 for x in config.values())
    seen = [
        set(family.batches(config, fold_in(1), 3, split=split).flatten().tolist())
        for split in ("train", "validation", "test")
    ]
    assert seen == [set(range(12)), set(range(12, 24)), set(range(24, 36))]


@pytest.mark.parametrize("name", ALL)
def test_a_batch_has_each_point_once_at_most(name):
    family = ALL[name](points=12, batch_size=7)
    batches = family.batches(family.sample(fold_in(0)), fold_in(1), 20)
    assert batches.shape == (20, 7)
    assert all(len(set(b.tolist())) == 7 for b in batches)
    assert len({tuple(sorted(b.tolist())) for b in batches}) > 10


@pytest.mark.parametrize("name", ALL)
def test_with_all_points_the_loss_is_one_function(name):
    family = ALL[name](points=12)
    task = sample_task(family, 4, 0)
    losses = [family.loss((), task.config, task.model_params, b) for b in task.batches]
    assert float(torch.stack(losses).std()) < 1e-6


def test_gaussians_have_the_moments_they_should():
    x, cluster = gaussian_points(fold_in(3), 2, 40_000, 3)
    assert cluster.bincount().tolist() == [60_000, 60_000]
    own, other = (x[cluster == i] for i in (0, 1))
    assert (own.mean(0) - other.mean(0)).abs().max() > 0.3
    assert (own.T.cov() - torch.eye(3)).abs().max() > 0.3
    assert (own.T.cov() - other.T.cov()).abs().max() > 0.3
    x, cluster = gaussian_points(fold_in(3), 2, 40_000, 3, identity=True)
    torch.testing.assert_close(x[cluster == 1].T.cov(), torch.eye(3), atol=0.03, rtol=0)
    spread = [gaussian_points(fold_in(5, i), 1, 1, 2)[0][0] for i in range(2000)]
    # Variance of a mean, and of a covariance A A' / dim on its diagonal: one each.
    torch.testing.assert_close(torch.stack(spread).var(0), torch.full((2,), 2.0), atol=0.2, rtol=0)


def test_no_label_is_left_out():
    drawn = [balanced_labels(fold_in(i), 5, 3) for i in range(50)]
    assert all(set(x.tolist()) == {0, 1, 2} for x in drawn)
    assert len({tuple(x.tolist()) for x in drawn}) > 20


def test_the_logistic_loss_written_out():
    config = {"x": torch.tensor([[1.0, 2.0], [-0.5, 0.3]]), "y": torch.tensor([0.0, 1.0])}
    params = {"w": torch.tensor([0.4, -0.2]), "b": torch.tensor(0.1)}
    scores = [0.4 - 0.4 + 0.1, -0.2 - 0.06 + 0.1]
    want = (math.log(1 + math.exp(scores[0])) + math.log(1 + math.exp(-scores[1]))) / 2
    want += 0.3 / 2 * (0.16 + 0.04)
    family = logistic_regression(2, points=2, weight_decay=0.3)
    batch = torch.tensor([0, 1])
    assert float(family.loss((), config, params, batch)) == pytest.approx(want)
    # The first is scored 0.1, label 0: wrong; the second -0.16, label 1: wrong.
    assert float(family.metrics((), config, params, batch)["accuracy"]) == 0.0


def test_the_robust_loss_written_out():
    config = {"x": torch.tensor([[1.0, 2.0], [-0.5, 0.3]]), "y": torch.tensor([3.0, 1.0])}
    params = {"w": torch.tensor([0.4, -0.2]), "b": torch.tensor(0.1)}
    residuals = [3 - 0.1, 1 - (-0.2 - 0.06 + 0.1)]
    want = sum(r * r / (4 + r * r) for r in residuals) / 2
    family = robust_regression(2, points=2, clusters=1, scale=2.0)
    assert float(family.loss((), config, params, torch.tensor([1, 0]))) == pytest.approx(want)


def test_clusters_of_the_robust_regression_lie_on_lines_of_their_own():
    family = robust_regression(3, points=80, clusters=2, noise=0.01)
    config = family.sample(fold_in(4))
    design = torch.cat([config["x"], torch.ones(240, 1)], 1)
    lines = []
    for i in range(2):
        rows, y = design[i::2], config["y"][i::2, None]
        line = torch.linalg.lstsq(rows, y).solution
        assert float((rows @ line - y).std()) == pytest.approx(0.01, rel=0.2)
        lines.append(line)
    assert (lines[0] - lines[1]).norm() > 0.5
    # Near one line, the points of its cluster cost next to nothing.
    params = {"w": lines[0][:3, 0], "b": lines[0][3, 0]}
    assert float(family.loss((), config, params, torch.arange(0, 80, 2))) < 1e-3


def test_the_net_loss_written_out():
    family = small_net(2, 2, 2, points=2, clusters=2, weight_decay=0.3)
    config = {"x": torch.tensor([[1.0, 2.0], [-1.0, 0.5]]), "y": torch.tensor([1, 0])}
    params = {
        "w0": torch.tensor([[1.0, -1.0], [0.5, 0.5]]),
        "b0": torch.tensor([0.0, 0.2]),
        "w1": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        "b1": torch.tensor([0.1, 0.0]),
    }
    # Hidden: (2, 0.2) and (max(-0.75, 0), 1.45); logits (2.1, 0.4) and (0.1, 2.9).
    logits, labels = [(2.1, 0.4), (0.1, 2.9)], [1, 0]
    losses = [math.log(sum(map(math.exp, z))) - z[y] for z, y in zip(logits, labels, strict=True)]
    want = sum(losses) / 2 + 0.3 / 2 * (2.5 + 5.0)
    batch = torch.tensor([0, 1])
    assert float(family.loss((), config, params, batch)) == pytest.approx(want)
    assert float(family.metrics((), config, params, batch)["accuracy"]) == 0.0


def test_the_sizes_are_those_of_the_paper():
    shapes = {
        name: {k: tuple(p.shape) for k, p in sample_task(make(), 1, 0).model_params.items()}
        for name, make in ALL.items()
    }
    linear = {"w": (3,), "b": ()}
    net = {"w0": (2, 2), "b0": (2,), "w1": (2, 2), "b1": (2,)}
    assert shapes == {"logistic": linear, "robust": linear, "net": net}
    assert all(sample_task(make(), 1, 0).batches.shape == (1, 100) for make in ALL.values())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: logistic_regression(0), "dim must be at least 1, got 0"),
        (lambda: logistic_regression(points=5, batch_size=6), "batch_size must be between 1 and"),
        (lambda: logistic_regression(weight_decay=-1.0), "weight_decay must be 0 or above"),
        (lambda: robust_regression(clusters=0), "clusters must be at least 1"),
        (lambda: robust_regression(scale=0.0), "scale must be positive"),
        (lambda: robust_regression(noise=-0.1), "noise must be 0 or above"),
        (lambda: small_net(classes=5), "clusters must be at least as many as classes, got 4 and 5"),
        (lambda: small_net().batches({}, fold_in(0), 1, split="dev"), "unknown split 'dev'"),
    ],
)
def test_what_there_is_not_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()
