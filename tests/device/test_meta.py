"""Meta-gradients on the ``meta`` device: right shapes without a single value."""

import pytest
import torch
from torch import nn
from torch.func import grad

from fmeta import functionalize, learn, optimizers, trees, unroll
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
