"""What a step holds in memory."""

import weakref

import pytest
import torch

import fmeta
from fmeta import optimizers
from fmeta._lift import lift
from fmeta.torch_optim import LearnedOptimizer


def watched(found: list[int]) -> fmeta.Optimizer:
    """Descent that says at each leaf how many of the step's deltas there are."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def update_leaf(weights, p, g, state, **given):
        found.append(sum(d() is not None for d in alive))
        delta = -g
        alive.append(weakref.ref(delta))
        return delta, {"sum": state["sum"] + g}

    return lift(
        lambda generator=None: {},
        lambda weights, p: {"sum": torch.zeros_like(p)},
        update_leaf,
        elementwise=True,
        stacked=False,
    )


def parameters() -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.full((n,), 2.0)) for n in (3, 4, 5, 6)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def test_deltas_are_applied_one_leaf_after_the_other() -> None:
    """From the third step on; in the first two one looks for memory that is used twice."""
    found: list[int] = []
    optimizer = LearnedOptimizer(parameters(), watched(found), lr=0.5)
    for _ in range(3):
        optimizer.step()
    assert max(found[:4]) == 3  # a delta each, as the functional form has it
    assert found[-4:] == [0, 0, 0, 0]


@pytest.mark.parametrize("rule", [optimizers.adam(0.1), optimizers.normalized_mlp(0.1)])
def test_each_group_has_its_own_rate_decay_and_direction(rule: fmeta.Optimizer) -> None:
    """Leaves of one shape, which go together, in groups that differ."""
    start = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(6)]
    options = [{"lr": 1.0}, {"lr": 0.5, "weight_decay": 0.1}, {"lr": 0.1, "maximize": True}]

    def trained(together: bool) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(p.detach().clone()) for p in start]
        groups = [{"params": params[i::3], **options[i]} for i in range(3)]
        opts = [LearnedOptimizer(groups, rule)] if together else []
        opts = opts or [LearnedOptimizer([g], rule) for g in groups]
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            for opt in opts:
                opt.step()
        return params

    for one, apart in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(one, apart, rtol=1e-6, atol=1e-7)
