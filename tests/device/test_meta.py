"""Meta-gradients on the ``meta`` device: right shapes without a single value."""

import pytest
import torch
from torch import nn
from torch.func import grad

from fmeta import estimators, functionalize, learn, optimizers, trees, unroll
from fmeta.tasks import TaskFamily, mixture
from fmeta.testing import activations_beside, built_in_trees, runs_on_meta

STEPS = 5
OF_A_TREE = {"per_parameter_sgd", "meta_curvature"}
RULES = {
    **{name: builder for name, builder in optimizers.BUILDERS.items() if name not in OF_A_TREE},
    "learned adam": lambda: learn(optimizers.adam, {"lr": "log", "betas": "log1m"}),
}
OPTIONS = {
    "plain": {},
    "sqrt": {"checkpoint": "sqrt"},
    "two snapshots": {"checkpoint": 2},
    "mixed mode": {"mixed_mode": True},
    "mixed mode, sqrt": {"mixed_mode": True, "checkpoint": "sqrt"},
    "first order": {"first_order": "inputs"},
}


def on_meta(tree):
    return trees.map(lambda x: x.to("meta"), tree)


def problem():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    apply, params, buffers = functionalize(net)
    batches = (torch.zeros(STEPS, 6, 3), torch.zeros(STEPS, 6, 2))

    def loss(p, batch):
        return (apply(p, buffers, batch[0]) - batch[1]).square().mean()

    return loss, on_meta(params), on_meta(batches)


def extras_of(rule):
    return activations_beside if "activations" in rule.needs else None


def check(rule, loss, params, batches, options):
    th = on_meta(rule.init())
    extras = (lambda p, batch: activations_beside(p)) if extras_of(rule) else None

    def meta(th, p):
        run = unroll(rule, loss, th, p, batches, extras=extras, **options)
        assert run.losses.shape == (STEPS,)
        assert all(x.device.type == "meta" for x in trees.leaves(run.hidden))
        return run.losses.sum()

    argnums = (0, 1) if trees.leaves(th) else (1,)
    grads = grad(meta, argnums=argnums)(th, params)
    for tree, g in zip((th, params)[-len(argnums) :], grads, strict=True):
        for a, b in zip(trees.leaves(tree), trees.leaves(g), strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", RULES)
def test_meta_gradients(name, options):
    loss, params, batches = problem()
    check(RULES[name](), loss, params, batches, OPTIONS[options])


@pytest.mark.parametrize("options", OPTIONS)
def test_meta_gradients_of_a_rate_for_each_parameter(options):
    loss, params, batches = problem()
    rule = optimizers.per_parameter_sgd(params)
    check(rule, loss, params, batches, OPTIONS[options])


@pytest.mark.parametrize("name", RULES)
def test_every_node_and_shape(name):
    rule = RULES[name]()
    runs_on_meta(rule, built_in_trees()["nested"], extras=extras_of(rule))


# Estimators: all of them, and what is chosen by values where there are some.


def quadratic(data, config, params, batch):
    return config["scale"] * (params["w"] - batch + data).square().sum()


FAMILY = TaskFamily(
    torch.zeros(3, device="meta"),
    lambda generator: {"scale": 1 + torch.rand((), generator=generator)},
    lambda config, generator: {"w": torch.randn(3, generator=generator)},
    lambda config, generator, steps, split="train": torch.randn(steps, 3, generator=generator),
    quadratic,
)
RULE = learn(optimizers.adam, {"lr": "log"}, lr=0.05)
PIECES = {"horizon": (3, 5), "truncation": 2}
NOISY = {**PIECES, "std": 0.1}
ESTIMATORS = {
    "full": ("full", {"horizon": 4}),
    "full, evaluated": ("full", {"horizon": 4, "eval_split": "validation"}),
    "forward": ("forward", {"horizon": 4}),
    "forward, in pieces": ("forward", PIECES),
    "truncated": ("truncated", PIECES),
    "pes": ("pes", NOISY),
    "pes, in chunks": ("pes", {**NOISY, "chunk_size": 3, "std": {"lr": torch.tensor(0.1)}}),
    "es": ("es", NOISY),
    "es_single": ("es_single", NOISY),
    "es_single, not antithetic": ("es_single", {**NOISY, "antithetic": False}),
    "nres": ("nres", NOISY),
    "score_function": ("score_function", {"horizon": 4, "std": 0.1}),
    "score_function, learned": (
        "score_function",
        {"horizon": 4, "std": lambda meta, config: meta["lr"].exp(), "baseline": "learned"},
    ),
}


@pytest.mark.parametrize("name", [*ESTIMATORS, "pes of a mixture"])
def test_estimates(name):
    builder, options = ESTIMATORS.get(name, ("pes", NOISY))
    family = mixture([FAMILY, FAMILY]) if "mixture" in name else FAMILY
    estimator = getattr(estimators, builder)(RULE, family, num_tasks=4, **options)
    meta_params = on_meta(RULE.init())
    state = estimator.init(meta_params, 0)
    for _ in range(2):
        estimate, state = estimator.estimate(meta_params, state)
        assert (estimate.loss.shape, estimate.loss.device.type) == ((), "meta")
        assert estimate.metrics["diverged"].shape == (4,)
        for g, x in zip(trees.leaves(estimate.grads), trees.leaves(meta_params), strict=True):
            assert (g.shape, g.dtype, g.device) == (x.shape, x.dtype, x.device)


def test_implicit_estimates():
    def loss(data, config, params, batch, meta_params):
        decay = meta_params["lr"].exp() * params["w"].square().sum()
        return quadratic(data, config, params, batch) + decay

    estimator = estimators.implicit(
        optimizers.sgd(0.1), FAMILY, num_tasks=4, horizon=4, inner_loss=loss
    )
    meta_params = on_meta(RULE.init())
    estimate = estimator.estimate(meta_params, estimator.init(meta_params, 0))[0]
    assert estimate.grads["lr"].is_meta
