"""Augmented tasks: what each augmentation does to loss and gradient, exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

import fmeta
from fmeta import trees
from fmeta.random import fold_in
from fmeta.tasks import augmented, digits, mixture, quadratic, sample_task, stack_tasks

FAMILY = digits((5,), batch_size=16)
ALL = {"rescale": 0.7, "permute_labels": True, "loss_scale": 0.5, "gradient_noise": 0.1}


def loss_at(family, task, params=None, step=0):
    batch = trees.map(lambda x: x[step], task.batches)
    return family.loss(
        family.data, task.config, task.model_params if params is None else params, batch
    )


def plain(task):
    """The same task without its augmentation (scales and labels apart)."""
    return task._replace(config=task.config["inner"], batches=task.batches["inner"])


def test_with_nothing_asked_for_it_is_the_family():
    one, other = sample_task(FAMILY, 2, 0), sample_task(augmented(FAMILY), 2, 0)
    assert other.config == {"inner": one.config}
    assert torch.equal(other.batches["inner"], one.batches)
    assert torch.equal(loss_at(augmented(FAMILY), other), loss_at(FAMILY, one))


@given(rescale=st.floats(0.01, 2), seed=st.integers(0, 100))
def test_rescaled_parameters_are_the_same_network(rescale, seed):
    family = augmented(FAMILY, rescale=rescale)
    task, own = sample_task(family, 1, seed), sample_task(FAMILY, 1, seed)
    scales = task.config["scales"]
    assert set(scales) == set(own.model_params)
    assert len({float(s) for s in scales.values()}) == 4
    for k, p in own.model_params.items():
        torch.testing.assert_close(task.model_params[k] * scales[k], p)
    torch.testing.assert_close(loss_at(family, task), loss_at(FAMILY, plain(own_like(task, own))))
    got = grad(lambda p: loss_at(family, task, p))(task.model_params)
    want = grad(lambda p: loss_at(FAMILY, plain(task), p))(own.model_params)
    for k, g in want.items():
        torch.testing.assert_close(got[k], scales[k] * g, rtol=1e-3, atol=1e-6)


def own_like(task, own):
    return task._replace(model_params=own.model_params)


def test_factors_are_log_normal():
    family = augmented(quadratic(2), rescale=0.5, loss_scale=0.2)
    configs = [family.sample(fold_in(0, i)) for i in range(2000)]
    for values, std in (
        (torch.stack([c["scales"]["x"] for c in configs]).log(), 0.5),
        (torch.stack([c["loss_scale"] for c in configs]).log(), 0.2),
    ):
        assert abs(float(values.mean())) < 4 * std / 2000**0.5
        assert float(values.std()) == pytest.approx(std, rel=0.07)


def test_permuted_labels_are_those_of_the_permuted_last_layer():
    family = augmented(FAMILY, permute_labels=True)
    task = sample_task(family, 1, 3)
    labels = task.config["labels"]
    assert sorted(labels.tolist()) == list(range(10))
    assert labels.tolist() != list(range(10))
    p = task.model_params
    # Output labels[y] of the one network is output y of the other.
    moved = {**p, "w1": p["w1"][:, labels], "b1": p["b1"][labels]}
    torch.testing.assert_close(loss_at(family, task), loss_at(FAMILY, plain(task), moved))
    batch = trees.map(lambda x: x[0], task.batches)
    got = family.metrics(family.data, task.config, p, batch)
    want = FAMILY.metrics(FAMILY.data, {}, moved, batch["inner"])
    assert torch.equal(got["accuracy"], want["accuracy"])


def test_the_loss_scale_is_a_factor():
    family = augmented(FAMILY, loss_scale=1.0)
    task = sample_task(family, 1, 0)
    want = task.config["loss_scale"] * loss_at(FAMILY, plain(task))
    torch.testing.assert_close(loss_at(family, task), want)


@pytest.mark.parametrize("others", [{}, {"rescale": 1.0, "loss_scale": 1.0}])
def test_noise_is_in_the_gradient_alone_and_zero_in_the_mean(others):
    steps, std = 400, 0.3
    quiet = augmented(FAMILY, **others)
    family = augmented(FAMILY, gradient_noise=std, **others)
    task = sample_task(family, steps, 0)
    same = task._replace(batches={"inner": task.batches["inner"]})
    factors = dict.fromkeys(task.model_params, 1.0)
    if others:
        factors = {k: task.config["loss_scale"] * s for k, s in task.config["scales"].items()}
    for step in range(3):
        assert torch.equal(loss_at(family, task, step=step), loss_at(quiet, same, step=step))

    def added(step):
        noisy = grad(lambda p: loss_at(family, task, p, step))(task.model_params)
        own = grad(lambda p: loss_at(quiet, same, p, step))(task.model_params)
        return {k: (noisy[k] - own[k]) / factors[k] for k in own}

    noise = [added(step) for step in range(40)]
    for k in noise[0]:
        values = torch.stack([n[k] for n in noise])
        assert float(values.std()) == pytest.approx(std, rel=0.2), k
        assert abs(float(values.mean())) < 5 * std / values.numel() ** 0.5, k
    assert not torch.equal(noise[0]["w0"], noise[1]["w0"])


def test_metrics_see_the_tasks_labels():
    family = augmented(FAMILY, permute_labels=True)
    task = sample_task(family, 1, 3)
    labels = task.config["labels"]
    p = {k: torch.zeros_like(x) for k, x in task.model_params.items()}
    p["b1"][labels[2]] = 1.0  # answers what twos are called here
    twos = (FAMILY.data["y"] == 2).nonzero()[:20, 0]
    batch = {"inner": torch.cat([twos, (FAMILY.data["y"] == 5).nonzero()[:60, 0]])}
    assert labels[2] != 2
    assert family.metrics(family.data, task.config, p, batch) == {"accuracy": torch.tensor(0.25)}


def test_metrics_see_the_familys_own_parameters():
    own = quadratic(2)._replace(metrics=lambda data, config, p, b: {"sum": p["x"].sum()})
    family = augmented(own, rescale=1.0)
    task, plain_task = sample_task(family, 1, 0), sample_task(own, 1, 0)
    batch = trees.map(lambda x: x[0], task.batches)
    got = family.metrics(family.data, task.config, task.model_params, batch)["sum"]
    torch.testing.assert_close(got, plain_task.model_params["x"].sum())


def test_each_parameter_has_noise_of_its_own():
    family = augmented(digits((10,), batch_size=16), gradient_noise=1.0)
    quiet = digits((10,), batch_size=16)
    task = sample_task(family, 1, 0)
    noisy = grad(lambda p: loss_at(family, task, p))(task.model_params)
    own = grad(lambda p: loss_at(quiet, plain(task), p))(task.model_params)
    one, other = (noisy[k] - own[k] for k in ("b0", "b1"))
    assert one.shape == other.shape
    assert (one - other).abs().max() > 0.5


def test_a_meta_gradient_through_noise_is_that_of_noise_as_data():
    """Noise enters an unroll as a constant term of each gradient."""
    family = augmented(quadratic(3), gradient_noise=0.2)
    task = trees.cast(sample_task(family, 4, 0), torch.float64)
    sgd = lambda lr: fmeta.optimizers.sgd(lr)
    zero = {"x": torch.zeros(3, dtype=torch.float64)}
    noise = [
        grad(lambda p, t=t: loss_at(family, task, p, t))(zero)["x"]
        - grad(lambda p, t=t: loss_at(quadratic(3), plain(task), p, t))(zero)["x"]
        for t in range(4)
    ]

    def end(lr):
        run = fmeta.unroll(
            sgd(lr), fmeta.tasks.loss_of_task(family), {}, task.model_params, task.batches,
            loss_args=(task.config,),
        )  # fmt: skip
        return run.params["x"].sum()

    def by_hand(lr):
        x, inner = task.model_params["x"], task.config["inner"]
        for n in noise:
            x = x - lr * (inner["H"] @ (x - inner["c"]) + n)
        return x.sum()

    lr = torch.tensor(0.3, dtype=torch.float64)
    for f in (lambda g: g, grad):
        torch.testing.assert_close(f(end)(lr), f(by_hand)(lr))


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer"])
def test_tasks_of_all_augmentations_at_once_equal_one_by_one(model):
    widths = (4, 4)
    family = augmented(digits(widths, batch_size=8, model=model, online=True), **ALL)
    tasks = [sample_task(family, 1, 0, i) for i in range(3)]
    both = stack_tasks(tasks)
    slope = grad(lambda p, c, b: family.loss(family.data, c, p, b))
    first = trees.map(lambda x: x[:, 0], both.batches)
    got = torch.vmap(slope)(both.model_params, both.config, first)
    for i, task in enumerate(tasks):
        batch = trees.map(lambda x: x[0], task.batches)
        want = slope(task.model_params, task.config, batch)
        for k in want:
            torch.testing.assert_close(got[k][i], want[k], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "error", "words"),
    [
        (FAMILY, {"rescale": -1.0}, ValueError, "rescale must be at least 0 and finite, got -1.0"),
        (FAMILY, {"loss_scale": -1.0}, ValueError, "loss_scale must be at least 0"),
        (FAMILY, {"gradient_noise": float("inf")}, ValueError, "gradient_noise must be .* finite"),
        (quadratic(2), {"permute_labels": True}, ValueError, r"integer labels .* got no y"),
        (
            FAMILY._replace(data={"y": torch.ones(3)}),
            {"permute_labels": True},
            ValueError,
            "got y of dtype torch.float32",
        ),
        (mixture([FAMILY]), {}, TypeError, "got a Mixture: for a mixture, augment each"),
    ],
)
def test_what_it_cannot_do_is_said(family, options, error, words):
    with pytest.raises(error, match=words):
        augmented(family, **options)
