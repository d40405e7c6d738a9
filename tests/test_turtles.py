"""Levels of learning: a learned rule outside, and an outer rate learned through two unrolls."""

import pytest
import torch
from torch import Tensor

import fmeta
from fmeta import optimizers, trees
from fmeta.estimators import full
from fmeta.meta_train import run
from fmeta.random import fold_in
from fmeta.tasks import digits, loss_of_task, sample_task

INNER, OUTER = 3, 3
FAMILY = digits((4,), batch_size=8)
PUPIL = optimizers.linear(lr=0.2)
LOSS = loss_of_task(FAMILY)


def doubled(tree):
    return trees.map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )


THETA = doubled(PUPIL.init())
TASKS = trees.map(
    lambda *x: torch.stack(x), *[doubled(sample_task(FAMILY, INNER, 0, k)) for k in range(OUTER)]
)


def three_levels(outer_rule, inside=None, outside=None):
    """The loss of meta-training under an outer rule, as a function of the rule's parameters."""

    def training(theta, task):
        config, params, batches = task
        return fmeta.unroll(
            PUPIL, LOSS, theta, params, batches, loss_args=(config,), **(inside or {})
        ).losses.mean()

    def meta_training(omega):
        done = fmeta.unroll(outer_rule, training, omega, THETA, TASKS, **(outside or {}))
        return done.losses.mean() + training(done.params, trees.map(lambda x: x[0], TASKS))

    return meta_training


OUTER_RULES = {
    "rate of sgd": fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.05),
    "rate and betas of adam": fmeta.learn(
        optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=0.05, betas=(0.8, 0.95)
    ),
    "linear": optimizers.linear(lr=0.05),
    "normalized_mlp": optimizers.normalized_mlp(lr=0.05, vectors="rule"),
}


@pytest.mark.parametrize("name", OUTER_RULES)
def test_the_third_level_derivative_equals_differences(name):
    rule = OUTER_RULES[name]
    loss = three_levels(rule)
    omega = doubled(rule.init(fold_in(3)))
    gradient = torch.func.grad(loss)(omega)
    tangent = trees.map(lambda x: torch.randn(x.shape, generator=fold_in(4)).double(), omega)
    along = sum((g * t).sum() for g, t in zip(*map(trees.leaves, (gradient, tangent)), strict=True))
    assert all(bool(g.abs().max() > 0) for g in trees.leaves(gradient))
    moved = lambda e: loss(trees.map(lambda x, t: x + e * t, omega, tangent))
    # Fourth-order differences, for the curvature along a random direction is not small.
    e = 1e-3
    differences = (8 * (moved(e) - moved(-e)) - (moved(2 * e) - moved(-2 * e))) / (12 * e)
    torch.testing.assert_close(along, differences, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ({"mixed_mode": True}, {}),
        ({}, {"mixed_mode": True}),
        ({"checkpoint": "sqrt"}, {"checkpoint": 2}),
        ({"recompute": "both"}, {"recompute": "rule"}),
    ],
    ids=str,
)
def test_saving_memory_at_either_level_changes_nothing(inside, outside):
    rule = OUTER_RULES["rate and betas of adam"]
    omega = doubled(rule.init())
    want = torch.func.grad(three_levels(rule))(omega)
    got = torch.func.grad(three_levels(rule, inside, outside))(omega)
    for path, a, b in zip(trees.paths(want), trees.leaves(got), trees.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12, msg=path)


def test_backward_gives_the_same_as_grad():
    rule = OUTER_RULES["linear"]
    omega = doubled(rule.init())
    leaf = omega["weight"].clone().requires_grad_()
    three_levels(rule)({"weight": leaf}).backward()
    want = torch.func.grad(three_levels(rule))(omega)["weight"]
    torch.testing.assert_close(leaf.grad, want, rtol=1e-9, atol=1e-12)


LEARNED = {
    "basis_mlp": optimizers.basis_mlp(),
    "adafactor_mlp": optimizers.adafactor_mlp(),
    "normalized_mlp": optimizers.normalized_mlp(lr=0.02),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_rule_outside_is_the_pure_functions_by_hand(name, tmp_path):
    """From a file of weights to the meta-parameters, bit for bit."""
    weights = trees.map(
        lambda x: x + 0.01 * torch.randn(x.shape, generator=fold_in(5)), LEARNED[name].init()
    )
    arguments = {"lr": 0.02} if name == "normalized_mlp" else {}
    fmeta.pretrained.save(tmp_path / "w.safetensors", name, weights, **arguments)
    outer, loaded = fmeta.pretrained.load(tmp_path / "w.safetensors")
    estimator = full(PUPIL, FAMILY, num_tasks=2, horizon=INNER)
    result = run(estimator, PUPIL.init(), outer=outer, outer_params=loaded, num_steps=4, seed=7)

    rule = LEARNED[name]
    theta, stream = PUPIL.init(), estimator.init(PUPIL.init(), 7)
    hidden = rule.init_hidden(weights, theta, num_steps=4)
    for _ in range(4):
        estimate, stream = estimator.estimate(theta, stream)
        theta, hidden = rule.step(weights, theta, estimate.grads, hidden, loss=estimate.loss)
    assert torch.equal(result.meta_params["weight"], theta["weight"])
    assert not torch.equal(theta["weight"], PUPIL.init()["weight"])
    others = run(estimator, PUPIL.init(), outer=outer, num_steps=4, seed=7)
    assert not torch.equal(result.meta_params["weight"], others.meta_params["weight"])


@pytest.mark.parametrize(
    ("outer", "outer_params", "message"),
    [
        (optimizers.basis_mlp(), PUPIL.init(), "outer_params do not fit the outer optimizer"),
        (optimizers.adam(), {"lr": torch.ones(())}, "outer_params do not fit.*got lr"),
        (PUPIL, {"weight": torch.ones(1, 3)}, r"weight \(1, 2\), got weight \(1, 3\)"),
        (optimizers.hebbian_mlp(), None, "needs activations, which meta-training cannot give"),
    ],
    ids=["another rule's", "of a rule without any", "another shape", "needs activations"],
)
def test_what_cannot_stand_outside_is_refused_at_once(outer, outer_params, message):
    estimator = full(PUPIL, FAMILY, num_tasks=2, horizon=INNER)
    with pytest.raises(ValueError, match=message):
        run(estimator, PUPIL.init(), outer=outer, outer_params=outer_params, num_steps=2)
