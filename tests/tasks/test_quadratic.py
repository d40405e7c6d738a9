"""Quadratics: the closed forms are those of gradient descent on the loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fmeta
from fmeta.random import fold_in
from fmeta.tasks import (
    loss_of_task,
    quadratic,
    quadratic_losses,
    quadratic_meta_gradient,
    quadratic_optimum,
    sample_task,
)


def drawn(dim=4, steps=6, seed=0, **options):
    """A family and a task in float64."""
    family = quadratic(dim, **options)
    return family, fmeta.trees.cast(sample_task(family, steps, seed), torch.float64)


@given(
    dim=st.integers(1, 6),
    steps=st.integers(1, 12),
    lr=st.floats(0.0, 2.5),
    seed=st.integers(0, 1000),
)
def test_closed_forms_are_those_of_an_unroll(dim, steps, lr, seed):
    family, task = drawn(dim, steps, seed)
    rate = torch.tensor(lr, dtype=torch.float64)

    def unrolled(lr, params):
        sgd = fmeta.learn(fmeta.optimizers.sgd, {"lr": "linear"}, lr=lr)
        run = fmeta.unroll(
            sgd, loss_of_task(family), {"lr": lr}, params, task.batches, loss_args=(task.config,)
        )
        return run.losses

    losses = quadratic_losses(task.config, rate, task.model_params, steps)
    tolerance = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(losses, unrolled(rate, task.model_params), **tolerance)
    got = quadratic_meta_gradient(task.config, rate, task.model_params, steps)
    want = torch.func.jacrev(unrolled)(rate, task.model_params)
    torch.testing.assert_close(got, want, **tolerance)
    closed = lambda lr, params: quadratic_losses(task.config, lr, params, steps)
    torch.testing.assert_close(
        torch.func.jacrev(closed)(rate, task.model_params), want, **tolerance
    )
    torch.testing.assert_close(
        torch.func.jacrev(closed, argnums=1)(rate, task.model_params),
        torch.func.jacrev(unrolled, argnums=1)(rate, task.model_params),
        **tolerance,
    )


def test_a_rate_that_ends_a_mode_at_once_has_finite_derivatives():
    config = {"H": torch.eye(2), "c": torch.zeros(2)}
    params = {"x": torch.ones(2)}
    got = quadratic_meta_gradient(config, 1.0, params, 4)
    assert got.tolist() == [0.0, 0.0, 0.0, 0.0]
    lr = torch.tensor(1.0)
    closed = torch.func.jacrev(lambda lr: quadratic_losses(config, lr, params, 4))(lr)
    assert closed.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_nothing_is_better_than_the_optimum():
    family, task = drawn()
    best, least = quadratic_optimum(task.config)
    loss = lambda p: family.loss((), task.config, p, task.batches[0])
    assert loss(best) == least == 0
    assert not torch.func.grad(loss)(best)["x"].any()
    assert loss(task.model_params) > least


@given(dim=st.integers(1, 8), condition=st.floats(1, 1e3), seed=st.integers(0, 1000))
def test_curvatures_are_within_the_condition(dim, condition, seed):
    h = quadratic(dim, condition).sample(fold_in(seed))["H"]
    torch.testing.assert_close(h, h.T)
    eigenvalues = torch.linalg.eigvalsh(h.double())
    assert eigenvalues.min() > (1 - 1e-3) / condition - 1e-5
    assert eigenvalues.max() < 1 + 1e-5


def test_noise_moves_the_optimum_that_a_batch_shows():
    family, task = drawn(noise=0.5, steps=4000)
    slope = torch.func.grad(lambda p, b: family.loss((), task.config, p, b))
    found = torch.vmap(slope, in_dims=(None, 0))(task.model_params, task.batches)["x"]
    h, error = task.config["H"], task.model_params["x"] - task.config["c"]
    torch.testing.assert_close(found[0], h @ (error - 0.5 * task.batches[0]))
    spread = 0.5 * h.norm(dim=1) / 4000**0.5
    assert ((found.mean(0) - h @ error).abs() < 4 * spread).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim must be at least 1 and finite, got 0"),
        ({"condition": 0.5}, "condition must be at least 1 and finite, got 0.5"),
        ({"noise": -1.0}, "noise must be at least 0 and finite, got -1.0"),
        ({"noise": float("nan")}, "noise must be at least 0"),
    ],
)
def test_what_it_cannot_be_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        quadratic(**options)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        quadratic().batches({}, fold_in(0), 2, split="dev")
