"""A scan is the plain loop, whatever is kept and whatever transforms it."""

import math
import weakref
from typing import NamedTuple

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import fmeta
from fmeta import optimizers
from fmeta.random import fold_in

T, D = 7, 2
DOUBLE = {"dtype": torch.float64}
W = 0.6 * torch.randn(D, D, generator=fold_in(0), **DOUBLE)
X0 = torch.randn(D, generator=fold_in(1), **DOUBLE)
XS = torch.randn(T, D, generator=fold_in(2), **DOUBLE)
W2, X2, XS2 = torch.stack([W, 0.5 * W, -W]), torch.stack([X0, 2 * X0]), torch.stack([XS, XS + 1])
WEIGHTS = torch.arange(1, T + 1, **DOUBLE)
SCHEDULES = ["sqrt", 1, 2, 5, 20]


def body(c, x, w):
    c = torch.tanh(w @ c + x)
    return c, c.square().sum()


def loop(w, x0, xs):
    """The plain loop, without fmeta."""
    ys = []
    for x in xs.unbind(0):
        x0, y = body(x0, x, w)
        ys.append(y)
    return x0, torch.stack(ys)


def run(schedule):
    if schedule == "loop":
        return loop
    return lambda w, x0, xs: fmeta.scan(body, x0, xs, consts=(w,), checkpoint=schedule)


def loss(schedule):
    def fn(w, x0, xs):
        c, ys = run(schedule)(w, x0, xs)
        return c.sum() + (ys * WEIGHTS).sum()

    return fn


def cubes(tree):
    return sum((x**3).sum() for x in tree_leaves(tree))


def double_backward(f):
    leaves = [x.clone().requires_grad_() for x in (W, X0, XS)]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(cubes(first), leaves)


def backward(f):
    leaves = [x.clone().requires_grad_() for x in (W, X0, XS)]
    f(*leaves).backward()
    return [x.grad for x in leaves]


def backward_twice(f):
    """One graph, two backward passes."""
    w = W.clone().requires_grad_()
    value = f(w, X0, XS)
    value.backward(retain_graph=True)
    value.backward()
    return w.grad


ALL = (0, 1, 2)
TANGENTS = (0.5 * W, -X0, 2 * XS)
TRANSFORMS = {
    "grad": lambda f, s: grad(f, ALL)(W, X0, XS),
    "grad2": lambda f, s: grad(lambda *a: cubes(grad(f, ALL)(*a)), ALL)(W, X0, XS),
    "vjp": lambda f, s: vjp(f, W, X0, XS)[1](torch.tensor(1.5, **DOUBLE)),
    "vjp of both": lambda f, s: vjp(run(s), W, X0, XS)[1]((X0, WEIGHTS)),
    "jvp": lambda f, s: jvp(f, (W, X0, XS), TANGENTS),
    "jvp of some": lambda f, s: jvp(lambda x: f(W, x, XS), (X0,), (X0,)),
    "jvp of grad": lambda f, s: jvp(grad(f, ALL), (W, X0, XS), TANGENTS),
    "grad of jvp": lambda f, s: grad(lambda w: jvp(lambda v: f(v, X0, XS), (w,), (W,))[1])(W),
    "jvp of jvp": lambda f, s: jvp(
        lambda w: jvp(lambda v: f(v, X0, XS), (w,), (W,))[1], (W,), (0.5 * W,)
    ),
    "vmap": lambda f, s: vmap(f, in_dims=(None, 0, 0))(W, X2, XS2),
    "vmap of grad": lambda f, s: vmap(grad(f, ALL), in_dims=(None, 0, 0))(W, X2, XS2),
    "vmap of vmap of grad": lambda f, s: vmap(
        vmap(grad(f), in_dims=(None, 0, 0)), in_dims=(0, None, None)
    )(W2, X2, XS2),
    "vmap of grad2": lambda f, s: vmap(lambda x: grad(lambda w: cubes(grad(f)(w, x, XS)))(W))(X2),
    "grad of vmap": lambda f, s: grad(lambda w: cubes(vmap(f, in_dims=(None, 0, 0))(w, X2, XS2)))(
        W
    ),
    "jvp of vmap": lambda f, s: jvp(lambda w: vmap(f, (None, 0, 0))(w, X2, XS2), (W,), (W,)),
    "vmap along another axis": lambda f, s: vmap(run(s), in_dims=(2, 1, 1), out_dims=1)(
        W2.movedim(0, 2), torch.stack([X0] * 3, 1), torch.stack([XS] * 3, 1)
    ),
    "jacrev": lambda f, s: jacrev(run(s), ALL)(W, X0, XS),
    "jacfwd": lambda f, s: jacfwd(run(s))(W, X0, XS),
    "hessian": lambda f, s: hessian(f)(W, X0, XS),
    "backward": lambda f, s: backward(f),
    "backward twice": lambda f, s: backward_twice(f),
    "double backward": lambda f, s: double_backward(f),
    "grad below autograd": lambda f, s: torch.autograd.grad(
        cubes(grad(f)(w := W.clone().requires_grad_(), X0, XS)), w
    ),
    "vmap below autograd": lambda f, s: torch.autograd.grad(
        cubes(vmap(f, (None, 0, 0))(w := W.clone().requires_grad_(), X2, XS2)), w
    ),
    "no_grad": lambda f, s: torch.no_grad()(f)(W, X0, XS),
}


def close(got, want, tol=1e-11):
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("schedule", [None, *SCHEDULES], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equals_the_plain_loop(transform, schedule):
    fn = TRANSFORMS[transform]
    close(fn(loss(schedule), schedule), fn(loss("loop"), "loop"))


@pytest.mark.parametrize("schedule", ["sqrt", 2])
def test_third_derivative(schedule):
    def weighted(s):
        def fn(w):
            c, ys = run(s)(w, X0, XS[:4])
            return c.sum() + ys.sum()

        return grad(lambda u: cubes(grad(lambda w: cubes(grad(fn)(w)))(u)))(W)

    close(weighted(schedule), weighted("loop"), 1e-10)


@pytest.mark.parametrize("schedule", [None, *SCHEDULES], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_loops(steps, schedule):
    def fn(s):
        c, ys = run(s)(W, X0, XS[:steps])
        return c, ys, grad(lambda w: run(s)(w, X0, XS[:steps])[0].sum())(W)

    close(fn(schedule), fn("loop"))


class Carry(NamedTuple):
    x: object
    nothing: object
    count: object
    rate: object


@pytest.mark.parametrize("schedule", [None, "sqrt", 1, 3], ids=str)
def test_trees_of_any_kind_are_carried(schedule):
    def step(c, x, w):
        new = Carry(torch.tanh(w @ c.x) * c.rate + x["u"], None, c.count + 1, c.rate)
        return new, Carry(new.x, None, c.count, [x["i"]])

    def total(w):
        start = Carry(X0, None, torch.tensor(3), 0.5)
        xs = {"u": XS, "i": torch.arange(T), "none": None}
        carry, ys = fmeta.scan(step, start, xs, consts=(w,), checkpoint=schedule)
        assert isinstance(carry, Carry)
        assert isinstance(ys, Carry)
        assert carry.nothing is ys.nothing is None
        assert carry.rate == 0.5
        return (carry.x * ys.x).sum(), (carry.count, ys.count, ys.rate[0])

    def by_hand(w):
        x, xs = X0, []
        for u in XS:
            x = torch.tanh(w @ x) * 0.5 + u
            xs.append(x)
        return (x * torch.stack(xs)).sum()

    slope, (count, counts, indices) = grad(total, has_aux=True)(W)
    close(slope, grad(by_hand)(W))
    assert count == 3 + T
    assert counts.tolist() == list(range(3, 3 + T))
    assert indices.tolist() == list(range(T))
    assert not counts.is_floating_point()


@pytest.mark.parametrize("schedule", [None, "sqrt", 1, 3], ids=str)
def test_without_xs_the_length_is_given(schedule):
    def fn(w):
        body = lambda c, x, w: (w * c, c)
        return fmeta.scan(body, w, None, length=5, consts=(w,), checkpoint=schedule)

    w = torch.tensor(1.1, **DOUBLE)
    close(fn(w), (w**6, w ** torch.arange(1, 6)))
    close(grad(lambda w: fn(w)[0])(w), 6 * w**5)


@pytest.mark.parametrize("schedule", [None, "sqrt", 2], ids=str)
def test_a_carry_that_is_returned_as_it_came(schedule):
    step = lambda c, x: (c, (c[0], c[0], x))
    fn = lambda x: fmeta.scan(step, (x, x), XS, checkpoint=schedule)
    close(fn(X0)[0], (X0, X0))
    slope = grad(lambda x: sum(y.sum() for y in tree_leaves(fn(x))))(X0)
    close(slope, torch.full_like(X0, 2.0 + 2 * T))


@pytest.mark.parametrize("schedule", [None, "sqrt", 2], ids=str)
def test_what_does_not_depend_on_the_input_has_a_zero_gradient(schedule):
    fn = lambda x: fmeta.scan(body, X0, XS, consts=(W,), checkpoint=schedule)[0].sum() + 0 * x
    assert grad(fn)(torch.ones(())) == 0
    detached = lambda w: fmeta.scan(
        lambda c, x, w: (body(c, x, w.detach())[0], ()), X0, XS, consts=(w,), checkpoint=schedule
    )[0].sum()
    assert grad(detached)(W).abs().max() == 0


@pytest.mark.parametrize("schedule", [1, 2, 3], ids=str)
def test_a_long_loop_with_few_snapshots_does_not_overflow(schedule):
    steps = 200
    xs = torch.zeros(steps, **DOUBLE)
    step = lambda c, x, w: (torch.tanh(w * c + x), ())
    one = lambda s: lambda w: fmeta.scan(step, w, xs, consts=(w,), checkpoint=s)[0]
    w = torch.tensor(1.05, **DOUBLE)
    close(grad(one(schedule))(w), grad(one(None))(w))
    leaf = w.clone().requires_grad_()
    one(schedule)(leaf).backward()
    close(leaf.grad, grad(one(None))(w))


def least_depth(steps, snapshots):
    r = 0
    while math.comb(snapshots + r, snapshots) < steps:
        r += 1
    return r


def counted(schedule, steps, outer):
    calls = [0]

    def step(c, x, w):
        calls[0] += 1
        return torch.tanh(w * c + x), ()

    fn = lambda w: fmeta.scan(step, w, torch.zeros(steps), consts=(w,), checkpoint=schedule)[0]
    outer(fn)
    return calls[0]


OUTER = {
    "grad": lambda fn: grad(fn)(torch.tensor(1.1)),
    "backward": lambda fn: fn(torch.tensor(1.1, requires_grad=True)).backward(),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("steps", [1, 2, 7, 40, 100])
@pytest.mark.parametrize("snapshots", [2, 3, 5, 10])
def test_binomial_runs_a_step_at_most_r_plus_2_times(snapshots, steps, outer):
    # and one more for the check of closures
    bound = (least_depth(steps, snapshots) + 2) * steps + 1
    assert counted(snapshots, steps, OUTER[outer]) <= bound


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("steps", [1, 7, 40, 100])
def test_sqrt_runs_a_step_twice(steps, outer):
    assert counted("sqrt", steps, OUTER[outer]) <= 2 * steps + 1


def test_without_checkpoint_a_step_runs_once():
    assert counted(None, 9, OUTER["grad"]) == 9


class Token:
    """Lives as long as the node of the graph that holds it."""


class Watch(torch.autograd.Function):
    """The identity; counts how many of its nodes are alive in graphs."""

    alive: weakref.WeakSet
    peak: int
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.token = Token()
        Watch.alive.add(ctx.token)
        Watch.peak = max(Watch.peak, len(Watch.alive))

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent


def peak_of(schedule, steps, outer):
    Watch.alive, Watch.peak = weakref.WeakSet(), 0
    step = lambda c, x, w: (Watch.apply(torch.tanh(w * c + x)), ())
    outer(lambda w: fmeta.scan(step, w, torch.zeros(steps), consts=(w,), checkpoint=schedule)[0])
    return Watch.peak


@pytest.mark.parametrize("outer", OUTER)
def test_the_graph_of_every_step_is_alive_without_checkpoint(outer):
    assert peak_of(None, 100, OUTER[outer]) == 100


@pytest.mark.parametrize("outer", OUTER)
def test_sqrt_keeps_the_graph_of_a_segment_only(outer):
    assert peak_of("sqrt", 100, OUTER[outer]) <= 2 * round(math.sqrt(100) / 2)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("snapshots", [3, 5, 10])
def test_binomial_keeps_the_graph_of_one_step_only(snapshots, outer):
    assert peak_of(snapshots, 100, OUTER[outer]) <= 2


def peak_carries(schedule, steps):
    alive, peak = weakref.WeakSet(), [0]

    def step(c, x, w):
        c = torch.tanh(w * c + x)
        alive.add(c)
        peak[0] = max(peak[0], len(alive))
        return c, ()

    w = torch.tensor(1.1, requires_grad=True)
    fmeta.scan(step, w, torch.zeros(steps), consts=(w,), checkpoint=schedule)[0].backward()
    return peak[0]


@pytest.mark.parametrize("snapshots", [2, 3, 5, 10, 20])
def test_binomial_keeps_as_many_carries_as_it_is_told(snapshots):
    # beside them the last carry of each of the r levels of recomputation, and two at work
    assert peak_carries(snapshots, 100) <= snapshots + least_depth(100, snapshots) + 2


def test_sqrt_keeps_about_two_roots_of_carries():
    assert peak_carries("sqrt", 100) <= 2.5 * math.sqrt(100)
    assert peak_carries(None, 100) == 100


@pytest.mark.parametrize("schedule", [None, "sqrt", 3], ids=str)
def test_an_inner_gradient_in_the_body(schedule):
    inner = lambda p, x: (p - x).square().square().sum()
    step = lambda p, x, lr: (p - lr * grad(inner)(p, x), inner(p, x))
    meta = lambda lr: fmeta.scan(step, X0, XS, consts=(lr,), checkpoint=schedule)[1].sum()

    def by_hand(lr):
        p, total = X0, 0.0
        for x in XS:
            total, p = total + inner(p, x), p - lr * 4 * (p - x) ** 3
        return total

    lr = torch.tensor(0.01, **DOUBLE)
    close(meta(lr), by_hand(lr))
    close(grad(meta)(lr), grad(by_hand)(lr))
    close(grad(grad(meta))(lr), grad(grad(by_hand))(lr))


@pytest.mark.parametrize("inner", [None, "sqrt", 2], ids=str)
@pytest.mark.parametrize("outer", [None, "sqrt", 2], ids=str)
def test_scan_within_scan(outer, inner):
    def fn(s, t):
        def row(c, x, w):
            return run(t)(w, c, torch.stack([x, 2 * x, -x]))

        if s == "loop":

            def total(w):
                c = X0
                for x in XS:
                    c, _ = row(c, x, w)
                return c.sum()
        else:

            def total(w):
                return fmeta.scan(row, X0, XS, consts=(w,), checkpoint=s)[0].sum()

        return total

    want = fn("loop", "loop")
    close(grad(fn(outer, inner))(W), grad(want)(W))
    close(vmap(grad(fn(outer, inner)))(W2), vmap(grad(want))(W2))
    leaf = W.clone().requires_grad_()
    fn(outer, inner)(leaf).backward()
    close(leaf.grad, grad(want)(W))


@pytest.mark.parametrize("schedule", [None, "sqrt", 2], ids=str)
def test_float32_and_float64_side_by_side(schedule):
    step = lambda c, x: ({"a": c["a"] * x, "b": c["b"] + c["a"].double()}, c["b"])
    start = {"a": torch.tensor(1.0), "b": torch.tensor(0.0, **DOUBLE)}
    xs = torch.full((4,), 0.5)
    fn = lambda a: fmeta.scan(step, {**start, "a": a}, xs, checkpoint=schedule)[0]["b"]
    assert fmeta.scan(step, start, xs, checkpoint=schedule)[1].dtype is torch.float64
    assert grad(fn)(start["a"]) == 1.875


def test_vmap_over_a_sweep_of_rates_under_checkpoint():
    def total(lr, schedule):
        rule = fmeta.learn(optimizers.adam, {"lr": "linear"})
        loss = lambda p, x: (p["w"] - x).square().sum()
        return fmeta.unroll(rule, loss, {"lr": lr}, {"w": X0}, XS, checkpoint=schedule).losses.sum()

    rates = torch.tensor([0.01, 0.1], **DOUBLE)
    want = torch.stack([grad(total)(lr, None) for lr in rates])
    close(vmap(grad(total), in_dims=(0, None))(rates, "sqrt"), want)


@pytest.mark.parametrize("schedule", [0, -1, "cube", 2.0, True])
def test_an_unknown_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match=f'checkpoint must be None, "sqrt".*{schedule!r}'):
        fmeta.scan(body, X0, XS, consts=(W,), checkpoint=schedule)


@pytest.mark.parametrize(
    ("xs", "length", "words"),
    [
        ({"a": torch.ones(3), "b": [torch.ones(4)]}, None, "path b/0 has 4 steps, but a has 3"),
        ({"a": torch.ones(())}, None, "path a is a scalar: it needs a leading dimension T"),
        (torch.ones(0, 2), None, "at least one step, got T = 0"),
        (None, 0, "at least one step, got T = 0"),
        (None, None, "give xs or length"),
        (torch.ones(3), 4, "length is 4, but xs at path <root> has 3 steps"),
    ],
)
def test_a_number_of_steps_that_is_unclear_is_refused(xs, length, words):
    with pytest.raises(ValueError, match=words):
        fmeta.scan(lambda c, x: (c, ()), X0, xs, length=length)


def test_an_xs_leaf_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="xs at path b is a float, not a tensor"):
        fmeta.scan(lambda c, x: (c, ()), X0, {"a": torch.ones(3), "b": 1.0})
