"""Every optimizer of the registry obeys every law."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmeta import learn, optimizers, trees
from fmeta.testing import (
    LAWS,
    activations_beside,
    check_optimizer,
    gradients,
    key_order_irrelevant,
    kinds_kept,
    none_gradients_skip,
    param_trees,
    permutation_equivariant,
    step_counts,
    vmap_equals_loop,
)

# Rules that know the axes of a tensor, so that only permutations along each of them commute.
AXES = {
    "muon",
    "adafactor, factored",
    "adafactor_mlp",
    "normalized_mlp",
    "basis_mlp",
    "velo",
    "hebbian_mlp",
}
OF_A_TREE = {"per_parameter_sgd", "meta_curvature"}
# Their weights are for the coordinates as they stand: no permutation need commute.
ASYMMETRIC = {"meta_curvature"}

RULES = {
    **{
        name: builder if name in OF_A_TREE else builder()
        for name, builder in optimizers.BUILDERS.items()
    },
    "sgd with momentum": optimizers.sgd(0.1, momentum=0.9),
    "sgd with Nesterov momentum": optimizers.sgd(0.1, momentum=0.9, nesterov=True),
    "rmsprop, centered, with momentum": optimizers.rmsprop(momentum=0.5, centered=True),
    "adam with eps_root": optimizers.adam(eps_root=1e-6),
    "rmsprop, optax's": optimizers.rmsprop(eps=0.0, eps_root=1e-8, momentum=0.9, nesterov=True),
    "radam, rectified": optimizers.radam(0.1, betas=(0.8, 0.9)),
    "adafactor, factored": optimizers.adafactor(0.1, 2, momentum=0.9, weight_decay=0.1),
    "schedule_free_adamw, warmed up": optimizers.schedule_free_adamw(0.1, warmup_steps=3),
    "learned sgd": learn(optimizers.sgd, {"lr": "log"}, lr=0.1),
    "learned sgd with momentum": learn(
        optimizers.sgd, {"lr": "linear", "momentum": "logit"}, lr=0.1, momentum=0.5
    ),
    "learned adam": learn(optimizers.adam, {"lr": "log", "betas": "log1m", "eps": "log"}, lr=1e-2),
    "learned rmsprop": learn(optimizers.rmsprop, {"alpha": "log1m"}, centered=True),
}
# With seed 0 all units of its first layer are dead at one coordinate: the next, whose bias is 0,
# stands at its kink.
SEEDS = {"adafactor_mlp": 1}
COMPILED = ("adam", "linear", "normalized_mlp", "basis_mlp")


def symmetry(name):
    if name in ASYMMETRIC:
        return None
    return "axes" if name in AXES else "coordinate"


def extras_of(rule):
    """What a rule reads beside the gradient."""
    return activations_beside if "activations" in getattr(rule, "needs", ()) else None


def of(name, params):
    rule = RULES[name]
    return rule(params) if name in OF_A_TREE else rule


@pytest.mark.parametrize("name", RULES)
def test_every_law_but_one_compilation(name):
    report = check_optimizer(
        RULES[name],
        equivariance=symmetry(name),
        exclude=["compiles_once"],
        extras=extras_of(RULES[name]),
        seed=SEEDS.get(name, 0),
    )
    left_out = {"compiles_once"} | ({"permutation_equivariant"} if name in ASYMMETRIC else set())
    assert set(report.held) == set(LAWS) - left_out


@pytest.mark.parametrize("name", [n for n in COMPILED if n in RULES])
def test_one_compilation(name):
    check_optimizer(RULES[name], laws=["compiles_once"], extras=extras_of(RULES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_one_compilation_of_all_rules_and_trees(name):
    from fmeta.testing import built_in_trees, compiles_once

    for params in built_in_trees().values():
        compiles_once(RULES[name], params, extras=extras_of(RULES[name]))


@pytest.mark.parametrize("name", RULES)
@given(st.data())
def test_laws_on_any_tree(name, data):
    params = data.draw(param_trees([torch.float64], max_leaves=5, max_numel=12))
    rule = of(name, params)
    law = data.draw(
        st.sampled_from([key_order_irrelevant, kinds_kept, none_gradients_skip, vmap_equals_loop])
    )
    setup = {"extras": extras_of(rule)}
    law(rule, params, **setup)
    if symmetry(name):
        permutation_equivariant(rule, params, equivariance=symmetry(name), steps=2, **setup)


@pytest.mark.parametrize("name", RULES)
@given(st.data())
def test_any_gradients_keep_everything_finite(name, data):
    params = data.draw(param_trees([torch.float32, torch.float64, torch.bfloat16], max_leaves=5))
    rule = of(name, params)
    th = rule.init()
    p, h = params, rule.init_hidden(th, params, num_steps=3)
    for _ in range(data.draw(step_counts(3))):
        grads = data.draw(gradients(params))
        before = p
        extras = activations_beside(p) if extras_of(rule) else None
        p, h = rule.step(th, p, grads, h, loss=torch.tensor(0.7), extras=extras)
        for old, g, new in zip(*map(trees.leaves, (before, grads, p)), strict=True):
            assert new.isfinite().all()
            assert (new.dtype, new.shape) == (old.dtype, old.shape)
            assert g is not None or torch.equal(old, new)
    for x in trees.leaves(h):
        assert not isinstance(x, torch.Tensor) or x.isfinite().all()
