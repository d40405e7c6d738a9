"""Functions recorded with their derivative: values and gradients of autograd, in fewer calls."""

import pytest
import torch
from torch.func import vmap

from fmeta import trees
from fmeta._autodiff import grad_and_value
from fmeta._trace_gradient import TracedWithGradient, _cut
from fmeta.random import fold_in

DOUBLE = {"dtype": torch.float64}


def one(theta, params, batch):
    """A step with a gradient in it, whose derivative is of second order."""

    def loss(p, x):
        return torch.tanh(x @ p["w"]).square().mean(), ()

    grads, (value, _) = grad_and_value(loss, params, batch["x"])
    rate = torch.exp(theta["rate"])
    new = trees.map(lambda p, g: p - rate * g * torch.sigmoid(theta["gate"]), params, grads)
    return new, value, batch["count"] + 1


step = vmap(one, in_dims=(0, 0, {"x": 0, "count": None}), out_dims=(0, 0, None))


def arguments(seed=0, members=3):
    def draw(i, *shape):
        return torch.randn(shape, generator=fold_in(seed, i), **DOUBLE)

    theta = {"rate": draw(0, members), "gate": draw(1, members, 5, 4)}
    batch = {"x": draw(3, members, 6, 5), "count": torch.tensor(seed)}
    return theta, {"w": draw(2, members, 5, 4)}, batch


def unrolled(fn, theta, params, batch, steps=3):
    """Three steps; the gradients of what comes out, by autograd."""
    theta = trees.map(lambda x: x.clone().requires_grad_(), theta)
    total = 0.0
    for i in range(steps):
        params, value, count = fn(theta, params, {**batch, "x": batch["x"] + i})
        total = total + value.sum()
        assert not count.requires_grad
    total = total + params["w"].square().sum()
    return total.detach(), torch.autograd.grad(total, trees.leaves(theta))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "made again"])
def test_gradients_through_several_steps_are_those_of_autograd(again, monkeypatch):
    cuts = []

    def cut(*args, **kwargs):
        cuts.append(_cut(*args, again=again))
        return cuts[-1]

    monkeypatch.setattr("fmeta._trace_gradient._cut", cut)
    recorded = TracedWithGradient(step, 2)
    for seed in range(2):
        got, want = (unrolled(fn, *arguments(seed)) for fn in (recorded, step))
        assert torch.equal(got[0], want[0])
        trees.map(torch.testing.assert_close, got[1], want[1])
    assert len(cuts) == 1  # recorded once


def test_what_is_made_again_is_not_kept():
    def kept(again):
        def fn(x, w):
            return torch.exp(torch.sin(x @ w)).cos()

        def joint(x, w, c):
            with torch.enable_grad():
                x, w = (y.detach().requires_grad_() for y in (x, w))
                y = fn(x, w)
                return [y.detach(), *torch.autograd.grad(y, (x, w), c)]

        given = [torch.ones(2, 2) for _ in range(3)]
        module = torch.fx.experimental.proxy_tensor.make_fx(joint)(*given)
        forward, _, inputs = _cut(module, 2, 1, again=again)
        return len(forward(*given[:2])) - 1, inputs

    assert kept(True) == (1, [0, 1])  # the product alone, beside both inputs
    assert kept(False)[0] > 1


def test_a_detached_part_has_no_gradient():
    def fn(x):
        return x * torch.tanh(x).detach()

    x = torch.tensor([0.5, -1.0], **DOUBLE, requires_grad=True)
    (got,) = torch.autograd.grad(TracedWithGradient(fn, 1)(x).sum(), x)
    assert torch.equal(got, torch.tanh(x).detach())


def test_memory_that_is_edited():
    def fn(x):
        y = x * 2
        y.select(0, 0).mul_(x[1])
        y.add_(x)
        return y

    x = torch.tensor([0.5, -1.0], **DOUBLE, requires_grad=True)
    got, want = TracedWithGradient(fn, 1)(x), fn(x)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_that_do_not_matter_have_zeros_and_come_back_as_they_are():
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    out, same = TracedWithGradient(lambda x, y: (x * 3, y), 2)(x, y)
    gx, gy = torch.autograd.grad(out.sum() + 0 * same.sum(), (x, y), retain_graph=True)
    assert torch.equal(gx, torch.full((2,), 3.0))
    assert not gy.any()
    assert torch.equal(torch.autograd.grad(same.sum(), y)[0], torch.ones(2))


def test_several_results_of_one_operation():
    def fn(x):
        a, b = x.sort().values.split(2)
        return a * b + x.max(0).values

    x = torch.tensor([3.0, 1.0, 2.0, 0.5], requires_grad=True)
    got, want = TracedWithGradient(fn, 1)(x), fn(x)
    assert torch.equal(got, want)
    weight = torch.tensor([1.0, 2.0])
    pair = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*pair)


def test_without_a_gradient_nothing_is_recorded_by_autograd():
    assert not TracedWithGradient(step, 2)(*arguments())[1].requires_grad


def test_a_second_derivative_is_refused():
    x = torch.ones(2, requires_grad=True)
    y = TracedWithGradient(lambda x: x**3, 1)(x)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_what_cannot_be_recorded_is_called_as_it_is_or_cannot_be_compiled():
    def branch(x):
        return x * 2 if x.sum() > 0 else x * 3

    recorded = TracedWithGradient(branch, 1)
    for value, factor in ((1.0, 2.0), (-1.0, 3.0)):
        x = torch.full((2,), value, requires_grad=True)
        assert torch.equal(torch.autograd.grad(recorded(x).sum(), x)[0], torch.full((2,), factor))
    with pytest.raises(ValueError, match="cannot be compiled"):
        TracedWithGradient(branch, 1, compile=True)(torch.ones(1))


def test_constants_with_a_gradient_and_transforms_see_the_function_itself():
    def fn(x, c):
        return x * c

    recorded = TracedWithGradient(fn, 1)
    x, c = torch.tensor(2.0), torch.tensor(3.0, requires_grad=True)
    assert torch.autograd.grad(recorded(x, c), c)[0] == 2
    assert torch.func.grad(recorded)(x, torch.tensor(3.0)) == 3


@pytest.mark.slow
def test_compiled_is_equal_to_rounding():
    compiled = TracedWithGradient(step, 2, compile=True)
    for seed in range(2):
        got, want = (unrolled(fn, *arguments(seed)) for fn in (compiled, step))
        trees.map(torch.testing.assert_close, got, want)
