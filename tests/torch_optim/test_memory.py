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


@pytest.mark.parametrize("shared", ["parameters", "a gradient"])
def test_what_shares_memory_is_read_before_anything_moves(shared: str) -> None:
    """As two parameters with one ``data`` do, or a gradient that was set to a parameter."""
    rule, lr = optimizers.normalized_mlp(0.1, weight_decay=0.5), 0.7
    memory = torch.linspace(-1, 1, 12).view(4, 3)
    params = [torch.nn.Parameter(memory)]
    if shared == "parameters":
        params.append(torch.nn.Parameter(memory.view(-1)[3:9].view(2, 3)))
    else:
        params.append(torch.nn.Parameter(torch.ones(2, 6)))
    opt = LearnedOptimizer([{"params": [p]} for p in params], rule, lr=lr)
    want = [p.detach().clone() for p in params]
    hidden = rule.init_hidden(rule.init(), want)
    for i in range(5):
        grads = [torch.sin(p.detach() + i) for p in params]
        if shared != "parameters":
            grads[1] = params[0].detach().view(2, 6)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        delta, hidden = rule.update(rule.init(), want, [g.clone() for g in grads], hidden)
        opt.step()
        if shared == "parameters":
            want[0].view(-1)[3:9] += lr * delta[1].flatten()
            want[0] += lr * delta[0]
            want[1] = want[0].view(-1)[3:9].view(2, 3).clone()
        else:
            want = [w + lr * d for w, d in zip(want, delta, strict=True)]
        torch.testing.assert_close([p.detach() for p in params], want)


def test_parts_of_one_memory_are_no_shared_memory() -> None:
    """The parameters of a flat buffer: their deltas need not be in memory at once either."""
    found: list[int] = []
    parts = torch.zeros(18).split([3, 4, 5, 6])
    params = [torch.nn.Parameter(x) for x in parts]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = LearnedOptimizer(params, watched(found))
    for _ in range(3):
        optimizer.step()
    assert found[-4:] == [0, 0, 0, 0]


def test_a_step_that_fails_moves_nothing_where_there_is_no_state() -> None:
    fails = False

    def update_leaf(weights, p, g, state, **given):
        if fails and len(p) == 5:
            raise MemoryError
        return -g, {}

    rule = lift(lambda generator=None: {}, lambda w, p: {}, update_leaf, elementwise=True)
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    for _ in range(2):
        optimizer.step()
    fails = True
    with pytest.raises(MemoryError):
        optimizer.step()
    assert [p[0].item() for p in params] == [0.0] * 4
    fails = False
    optimizer.step()
    assert [p[0].item() for p in params] == [-1.0] * 4
