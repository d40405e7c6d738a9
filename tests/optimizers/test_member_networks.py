"""The networks of many trainings as one operation, which goes through the cache tile by tile."""

import itertools

import pytest
import torch

import fmeta
from fmeta.estimators import _advance
from fmeta.optimizers import _coordinate_net, _member_networks
from fmeta.optimizers._member_networks import in_tiles, undifferentiated, undifferentiated_now


def drawn(n, widths=(5, 16, 7, 2), wide=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = list(itertools.pairwise(widths))
    weights = [normal(b, a) / a**0.5 for a, b in pairs]
    bias = [normal(b, n if wide and not i else 1) for i, (_, b) in enumerate(pairs)]
    return normal(widths[0], n), weights, bias


def plain(x, weights, bias):
    for i, (w, b) in enumerate(zip(weights, bias, strict=True)):
        x = w @ (x.relu() if i else x) + b
    return x[0] * x[1].exp()


@pytest.mark.parametrize("size", [40, 2000, 2**18])  # pieces of a member, some members, all
@pytest.mark.parametrize("wide", [False, True])
def test_members_side_by_side_are_each_by_itself(size, wide, monkeypatch):
    monkeypatch.setattr(_member_networks, "_IN_CACHE", size)
    members = [drawn(29, wide=wide, seed=seed) for seed in range(5)]
    x = torch.stack([m[0] for m in members])
    weights, bias = (
        [torch.stack(ts) for ts in zip(*(m[i] for m in members), strict=True)] for i in (1, 2)
    )
    before = [t.clone() for t in (x, *weights, *bias)]
    found = torch.vmap(in_tiles)(x, weights, bias)
    want = torch.stack([plain(*m) for m in members])
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, before, (x, *weights, *bias)))  # nothing given was written to


def test_what_is_the_same_for_all_members_and_members_of_members():
    x, weights, bias = drawn(9)
    many = torch.stack([x, -x, 2 * x]).unflatten(0, (3, 1)).movedim(0, -1)
    run = torch.vmap(torch.vmap(in_tiles, (0, None, None)), (-1, None, None))
    want = torch.stack([plain(t, weights, bias) for t in (x, -x, 2 * x)])[:, None]
    torch.testing.assert_close(run(many, weights, bias), want, rtol=1e-12, atol=1e-12)


def test_without_values():
    x, weights, bias = drawn(9)
    meta = [[t.to("meta") for t in ts] for ts in (weights, bias)]
    assert in_tiles(x.to("meta"), *meta).shape == (9,)


@torch.no_grad()
def test_rules_are_told_where_nothing_differentiates():
    assert not undifferentiated_now()
    with undifferentiated(True):
        assert undifferentiated_now()
        with torch.enable_grad():
            assert not undifferentiated_now()
        for differentiate in (torch.func.grad, torch.func.jacfwd):
            seen = []
            differentiate(lambda x, seen=seen: seen.append(undifferentiated_now()) or x)(
                torch.ones(())
            )
            assert seen == [False]
        with undifferentiated(False):
            assert not undifferentiated_now()
    assert not undifferentiated_now()


def counted(monkeypatch):
    calls = []

    def count(*args):
        calls.append(args)
        return in_tiles(*args)

    monkeypatch.setattr(_coordinate_net, "in_tiles", count)
    return calls


def advanced(trace=False):
    """Parameters and losses of three members after four steps."""
    rule, family = fmeta.optimizers.mlp(), fmeta.tasks.digits((4,), batch_size=8)  # 64 x 4
    advance = _advance.by_steps(rule, family, evaluate=False, trace=trace)
    seeds = [fmeta.random.fold_in(0, i) for i in range(3)]
    configs = [family.sample(seed) for seed in seeds]
    params = [family.init(*pair) for pair in zip(configs, seeds, strict=True)]
    batches = [family.batches(*pair, 4) for pair in zip(configs, seeds, strict=True)]
    thetas = [rule.init(seed) for seed in seeds]
    hidden = [rule.init_hidden(*pair) for pair in zip(thetas, params, strict=True)]

    def stacked(members, dim=0):
        return fmeta.trees.map(lambda *xs: torch.stack(xs, dim), *members)

    given = [stacked(x) for x in (thetas, params, hidden, configs)]
    params, _, losses, _ = advance(*given, stacked(batches, 1), ())
    return params, losses


def test_steps_that_nothing_differentiates_take_it_recorded_or_not(monkeypatch):
    calls = counted(monkeypatch)
    with torch.no_grad():
        one, another = advanced(), advanced(trace=True)
    assert calls
    fmeta.trees.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), one, another)
    calls.clear()
    plainly = advanced()  # autograd may be recording
    assert not calls
    fmeta.trees.map(torch.testing.assert_close, one, plainly)


def test_steps_within_a_transform_do_not_take_it(monkeypatch):
    calls = counted(monkeypatch)
    one = (torch.ones(()),)
    with torch.no_grad():
        torch.func.jvp(lambda x: advanced()[1] * x, one, one)
    assert not calls


@pytest.mark.parametrize("trace", [False, True])
def test_losses_that_make_steps_of_a_learned_rule_are_differentiated(trace):
    inner = fmeta.optimizers.mlp()  # 32 units: its weights are the parameters that sgd moves

    def loss(data, config, params, batch):
        own = {"w": batch}
        delta, _ = inner.update(params, own, own, inner.init_hidden(params, own))
        return (own["w"] + 100 * delta["w"]).square().mean()

    family = fmeta.tasks.TaskFamily(
        (),
        lambda generator: {"x": torch.zeros(())},
        lambda config, generator: inner.init(generator),
        lambda config, generator, steps, split="train": torch.randn(
            steps, 20, 20, generator=generator
        ),
        loss,
    )
    rule = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.1)
    settings = {"num_tasks": 2, "horizon": 4, "truncation": 2, "std": 0.01, "trace": trace}
    estimator = fmeta.estimators.pes(rule, family, **settings)
    estimate, _ = estimator.estimate(rule.init(), estimator.init(rule.init(), 0))
    assert estimate.loss.isfinite()
    assert estimate.grads["lr"] != 0
