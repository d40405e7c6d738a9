"""Directly under one vmap, inner gradients are taken below it: nothing else may change."""

import pytest
import torch
from torch.func import grad, vmap

import fmeta
from fmeta._autodiff import _directly_under_vmap, grad_and_value


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"w": draw(3, 2), "b": draw(2, seed=1)}
X = draw(4, 5, 3, seed=2)  # four tasks of five points


def loss(p, x, scale=1.0):
    return scale * (x @ p["w"] + p["b"]).tanh().square().sum(), {"mean": x.mean(), "note": "kept"}


def mean_of_squares(grads):
    return sum(g.square().mean() for g in grads.values())


def test_the_way_is_taken_when_vmap_is_the_only_transform():
    leaf = PARAMS["w"].clone().requires_grad_()
    seen = []

    def f(x, p):
        seen.append(_directly_under_vmap({"w": p}, (x,)))
        return x

    vmap(f, in_dims=(0, None))(X, leaf)  # below it, autograd records
    vmap(f, in_dims=(0, None))(X, PARAMS["w"])  # below it, nothing to differentiate
    with torch.no_grad():
        vmap(f, in_dims=(0, None))(X, PARAMS["w"])
    grad(lambda w: vmap(f, in_dims=(0, None))(X, w).sum() + w.sum())(PARAMS["w"])
    assert seen == [True, False, True, False]


@pytest.mark.parametrize("shared", [True, False], ids=["shared params", "own params"])
def test_second_derivatives_of_a_batch_equal_those_of_its_members(shared):
    leaf = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}

    def member(p, x):
        grads, (value, aux) = grad_and_value(loss, p, x)
        return mean_of_squares(grads) + value + aux["mean"]

    scale = torch.arange(1.0, 5.0, dtype=torch.float64)

    def own(p, s):
        return {k: v * s for k, v in p.items()}

    if shared:
        total = vmap(member, in_dims=(None, 0))(leaf, X).sum()
        one_by_one = sum(member(leaf, x) for x in X)
    else:
        total = vmap(lambda s, x: member(own(leaf, s), x))(scale, X).sum()
        one_by_one = sum(member(own(leaf, s), x) for s, x in zip(scale, X, strict=True))
    torch.testing.assert_close(total, one_by_one)
    got = torch.autograd.grad(total, list(leaf.values()))
    want = torch.autograd.grad(one_by_one, list(leaf.values()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_a_closed_over_batched_tensor_keeps_its_member():
    leaf = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}
    scale = torch.arange(1.0, 5.0, dtype=torch.float64).requires_grad_()

    def member(s, x):
        grads, (value, _) = grad_and_value(lambda p, x: loss(p, x, s), leaf, x)
        return mean_of_squares(grads) + value

    total = vmap(member)(scale, X).sum()
    one_by_one = sum(member(s, x) for s, x in zip(scale, X, strict=True))
    wanted = [*leaf.values(), scale]
    got, want = torch.autograd.grad(total, wanted), torch.autograd.grad(one_by_one, wanted)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_a_batched_unroll_has_the_meta_gradient_of_its_tasks():
    inner = fmeta.learn(fmeta.optimizers.adam, {"lr": "log"}, lr=0.1)
    learned = {"lr": torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)}
    leaf = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}

    def task(x):
        batches = x.expand(3, *x.shape)
        return fmeta.unroll(inner, lambda p, x: loss(p, x)[0], learned, leaf, batches).losses[-1]

    wanted = [*leaf.values(), learned["lr"]]
    got = torch.autograd.grad(vmap(task)(X).sum(), wanted)
    want = torch.autograd.grad(sum(task(x) for x in X), wanted)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_members_draw_their_own_noise_when_vmap_is_told_to():
    leaf = PARAMS["w"].clone().requires_grad_()

    def member(x):
        def noisy(p, x):
            return (x @ p["w"] * torch.rand(2, dtype=x.dtype)).sum(), ()

        return grad_and_value(noisy, {"w": leaf}, x)[0]["w"]

    same = torch.ones(4, 5, 3, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = vmap(member, randomness="different")(same)
    assert not torch.equal(out[0], out[1])
