"""Mixed mode is the same gradient, differentiated forward over reverse."""

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import fmeta
from fmeta import _scan_keeping, fewshot, optimizers
from fmeta._autodiff import grad_and_value
from fmeta._mixed import mixed_grad_and_value
from fmeta.random import fold_in

DOUBLE = {"dtype": torch.float64}
P = {
    "w": torch.randn(3, generator=fold_in(0), **DOUBLE),
    "b": torch.randn((), generator=fold_in(1), **DOUBLE),
}
X = torch.randn(4, 3, generator=fold_in(2), **DOUBLE)
S = torch.tensor(1.3, **DOUBLE)


def loss(p, x, s):
    value = torch.tanh(x @ p["w"] * s + p["b"]).pow(3).sum()
    return value, {"seen": value * s, "count": torch.tensor(4), "name": None}


def cubes(tree):
    return sum((x**3).sum() for x in tree_leaves(tree) if x.is_floating_point())


def size(gradient):
    """A scalar of gradient, loss and aux, that any transform can be tried on."""

    def fn(p, x, s):
        grads, (value, aux) = gradient(loss, p, x, s)
        return cubes(grads) + value.sin() + aux["seen"].cos()

    return fn


ALL = (0, 1, 2)
TANGENTS = ({"w": P["w"], "b": -P["b"]}, X.flip(0), 2 * S)
X2, S2 = torch.stack([X, -X]), torch.stack([S, 2 * S])


def by_autograd(f, order):
    leaves = [P["w"].clone(), P["b"].clone(), X.clone(), S.clone()]
    leaves = [x.requires_grad_() for x in leaves]
    w, b, x, s = leaves
    first = torch.autograd.grad(f({"w": w, "b": b}, x, s), leaves, create_graph=order == 2)
    return first if order == 1 else torch.autograd.grad(cubes(first), leaves)


TRANSFORMS = {
    "value": lambda f: f(P, X, S),
    "no_grad": lambda f: torch.no_grad()(f)(P, X, S),
    "grad": lambda f: grad(f, ALL)(P, X, S),
    "grad of one": lambda f: grad(f, 2)(P, X, S),
    "vjp": lambda f: vjp(f, P, X, S)[1](S),
    "jvp": lambda f: jvp(f, (P, X, S), TANGENTS),
    "jvp of one": lambda f: jvp(lambda s: f(P, X, s), (S,), (S,)),
    "grad of grad": lambda f: grad(lambda *a: cubes(grad(f, ALL)(*a)), ALL)(P, X, S),
    "jvp of grad": lambda f: jvp(grad(f, ALL), (P, X, S), TANGENTS),
    "grad of jvp": lambda f: grad(lambda s: jvp(lambda t: f(P, X, t), (s,), (S,))[1])(S),
    "vmap": lambda f: vmap(f, (None, 0, 0))(P, X2, S2),
    "vmap of grad": lambda f: vmap(grad(f, ALL), (None, 0, 0))(P, X2, S2),
    "grad of vmap": lambda f: grad(lambda p: cubes(vmap(f, (None, 0, 0))(p, X2, S2)))(P),
    "backward": lambda f: by_autograd(f, 1),
    "double backward": lambda f: by_autograd(f, 2),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equals_plain_gradients_under(transform):
    got = TRANSFORMS[transform](size(mixed_grad_and_value))
    want = TRANSFORMS[transform](size(grad_and_value))
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_aux_keeps_integers_and_none():
    _, (_, aux) = mixed_grad_and_value(loss, P, X, S)
    assert aux["count"] == 4
    assert aux["name"] is None


def test_a_parameter_that_the_loss_does_not_read():
    fn = lambda p, x: (p["w"].square().sum() * x, ())
    unused = {"w": P["w"], "u": S}
    outer = lambda p: cubes(mixed_grad_and_value(fn, p, S)[0])
    plain = lambda p: cubes(grad_and_value(fn, p, S)[0])
    assert mixed_grad_and_value(fn, unused, S)[0]["u"] == 0
    torch.testing.assert_close(grad(outer)(unused)["w"], grad(plain)(unused)["w"])


def test_the_loss_returned_as_aux_too():
    fn = lambda p, x: ((v := (p["w"] * x).sum().square()), {"loss": v, "x": x})
    meta = lambda x: sum(
        y.sum() for y in tree_leaves(mixed_grad_and_value(fn, {"w": P["w"]}, x)[1])
    )
    torch.testing.assert_close(grad(meta)(S), 4 * P["w"].sum() ** 2 * S + 1)


def test_noise_in_the_loss_is_refused():
    drop = nn.Dropout(0.5)
    with pytest.raises(ValueError, match="draws random numbers"):
        fmeta.unroll(
            optimizers.sgd(0.1),
            lambda p, x: drop(p["w"]).sum(),
            {},
            P,
            torch.zeros(3),
            mixed_mode=True,
        )


@pytest.mark.parametrize("order", [True, "gradients", "inputs"])
def test_first_order_is_refused(order):
    with pytest.raises(ValueError, match=r"mixed_mode=True cannot be combined.*drop one"):
        fmeta.unroll(
            optimizers.sgd(0.1),
            lambda p, x: p["b"].square(),
            {},
            P,
            torch.zeros(3),
            mixed_mode=True,
            first_order=order,
        )


def test_a_loss_that_is_no_scalar_is_refused_as_without():
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"floating scalar, got a tensor of shape \(3,\)"):
            fmeta.unroll(
                optimizers.sgd(0.1), lambda p, x: p["w"], {}, P, torch.zeros(3), mixed_mode=mode
            )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives_are_those_of_the_function_where_its_values_are_known(transform):
    def taken_from(found):
        return lambda loss, *args: mixed_grad_and_value(loss, *args, known=found)

    if "vmap" in transform:
        many = [mixed_grad_and_value(loss, P, X2[i], S2[i]) for i in (0, 1)]
        for _, (_, aux) in many:
            del aux["name"]  # None, which vmap does not take
        known = fmeta.trees.stack(many)

        def f(p, x, s, known):  # what is known is batched along, as in a batched loop
            return size(taken_from(known))(p, x, s)

        batched = lambda p, x, s: vmap(f, (None, 0, 0, 0))(p, x, s, known)
        gradients = lambda p, x, s: vmap(grad(f, ALL), (None, 0, 0, 0))(p, x, s, known)
        got = {
            "vmap": lambda: batched(P, X2, S2),
            "vmap of grad": lambda: gradients(P, X2, S2),
            "grad of vmap": lambda: grad(lambda p: cubes(batched(p, X2, S2)))(P),
        }[transform]()
    else:
        got = TRANSFORMS[transform](size(taken_from(mixed_grad_and_value(loss, P, X, S))))
    want = TRANSFORMS[transform](size(grad_and_value))
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpoint", ["sqrt", 2, 1])
def test_kept_gradients_spare_all_but_one_evaluation_of_a_step(checkpoint):
    calls = []

    def fn(p, x):
        calls.append(1)
        return loss(p, x, S)[0]

    xs = torch.randn(8, 4, 3, generator=fold_in(5), **DOUBLE)

    def evaluations(mixed_mode):
        rule = fmeta.learn(optimizers.adam, {"lr": "log"}, lr=0.1)
        theta = {"lr": rule.init()["lr"].double().requires_grad_()}
        calls.clear()
        run = fmeta.unroll(rule, fn, theta, P, xs, checkpoint=checkpoint, mixed_mode=mixed_mode)
        forward = len(calls)
        run.losses.sum().backward()
        return forward, len(calls) - forward

    # One in the forward pass (and the guard's look at the first step), one in each second
    # derivative, whatever the schedule; the first step's gradient does not depend on the rate.
    assert evaluations("keep_gradients") == (8 + 1, 7)
    assert evaluations(True)[1] >= 2 * 7


def test_kept_gradients_of_members_that_share_their_start():
    """The first step's gradient is the same for all learning rates, later ones are not."""
    xs = torch.randn(5, 4, 3, generator=fold_in(6), **DOUBLE)

    def final(lr, **options):
        rule = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.1)
        fn = lambda p, x: loss(p, x, S)[0]
        return fmeta.unroll(rule, fn, {"lr": lr}, P, xs, **options).losses[-1]

    rates = torch.tensor([-3.0, -4.0], **DOUBLE)
    want = vmap(grad(final))(rates)
    keep = {"mixed_mode": "keep_gradients", "checkpoint": "sqrt"}
    torch.testing.assert_close(vmap(grad(lambda lr: final(lr, **keep)))(rates), want)


@pytest.mark.parametrize("checkpoint", [None, "sqrt"])
@pytest.mark.parametrize("mixed_mode", [True, "keep_gradients"])
def test_a_meta_batch_of_tasks_that_share_their_start(mixed_mode, checkpoint):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 6, 3, generator=fold_in(7), **DOUBLE)
    y = (torch.arange(6) % 2).expand(2, 6)
    episodes = fewshot.Episode(fewshot.Examples(x, y), fewshot.Examples(x.flip(1), y))
    learner, mixed = (
        fewshot.maml(net, num_steps=3, **options)
        for options in ({}, {"mixed_mode": mixed_mode, "checkpoint": checkpoint})
    )
    start = learner.init()
    got, want = (fn.estimate(start, episodes).grads for fn in (mixed, learner))
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_kept_gradients_beside_numbers_in_the_model_state():
    xs = torch.randn(4, 4, 3, generator=fold_in(8), **DOUBLE)

    def final(lr, **options):
        rule = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.1)
        fn = lambda p, x, state: (loss(p, x, state["scale"])[0], state)
        state = {"scale": 1.3}
        return fmeta.unroll(rule, fn, {"lr": lr}, P, xs, model_state=state, **options).losses[-1]

    lr = torch.tensor(-3.0, **DOUBLE)
    keep = {"mixed_mode": "keep_gradients", "checkpoint": "sqrt"}
    torch.testing.assert_close(grad(final)(lr), grad(lambda lr: final(lr, **keep))(lr))


@pytest.mark.parametrize("setting", ["no_grad", "constants", "vmap", "jvp"])
def test_gradients_are_kept_only_where_a_derivative_in_reverse_may_come(setting, monkeypatch):
    made = []

    class Spy(_scan_keeping._Kept):
        def append(self, tensors):
            made.append(tensors)
            super().append(tensors)

    monkeypatch.setattr(_scan_keeping, "_Kept", Spy)
    xs = torch.randn(4, 4, 3, generator=fold_in(9), **DOUBLE)

    def final(lr):
        rule = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.1)
        fn = lambda p, x: loss(p, x, S)[0]
        options = {"mixed_mode": "keep_gradients", "checkpoint": "sqrt"}
        return fmeta.unroll(rule, fn, {"lr": lr}, P, xs, **options).losses[-1]

    lr = torch.tensor(-3.0, **DOUBLE)
    run = {
        "no_grad": lambda: torch.no_grad()(final)(lr),
        "constants": lambda: final(lr),
        "vmap": lambda: torch.no_grad()(vmap(final))(lr.expand(2)),
        "jvp": lambda: jvp(final, (lr,), (lr,)),
    }[setting]
    run()
    assert not made
    batched = lr.expand(2).clone().requires_grad_()
    vmap(final)(batched).sum().backward()
    assert len(made) == 4
