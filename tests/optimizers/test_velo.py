"""velo: tiles, transforms, ties of axes, what it sees of losses and tensors."""

import math

import numpy as np
import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fmeta
from fmeta import _groups, trees
from fmeta.optimizers import velo
from fmeta.optimizers._velo_features import factored_axes
from fmeta.optimizers._velo_tensor import inputs, start_losses, summary, training
from fmeta.random import fold_in

SMALL = {"lstm_hidden_size": 6, "param_inits": 50, "step_mult": 0.1, "exp_mult": 0.1}
TREE = {"w": (3, 4), "conv": (2, 3, 3, 3), "b": (3,), "s": (), "none": (0, 3), "empty": (0,)}


def draw_tree(generator, dtype=torch.float64):
    return {k: torch.randn(s, generator=generator, dtype=dtype) for k, s in TREE.items()}


def scalar(x, dtype=torch.float64):
    return torch.tensor(x, dtype=dtype)


# -- tiles -------------------------------------------------------------------------------------

SHAPES = [(7,), (1,), (5, 3), (1, 7), (7, 1), (6, 6), (3, 2, 4), (2, 3, 45, 50), (4, 3, 3, 3)]
TILES = [(s, c) for s in SHAPES for c in ((1, 7) if np.prod(s) < 200 else (100, 2300))]


@pytest.mark.parametrize(("shape", "chunk_size"), TILES)
def test_tiles_give_the_plain_result_to_rounding(shape, chunk_size):
    tiled = velo(**SMALL, chunk_size=chunk_size, weight_decay=0.1)
    plain = velo(**SMALL, chunk_size=10**9, weight_decay=0.1)
    th = trees.cast(plain.init(fold_in(3)), torch.float64)
    generator = fold_in(4, *shape)
    draw = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)
    p = q = draw()
    h = k = plain.init_hidden(th, p, num_steps=5)
    for t in range(3):
        g, loss = draw(), scalar(3.0 - t)
        p, h = plain.step(th, p, g, h, loss=loss)
        q, k = tiled.step(th, q, g, k, loss=loss)
    torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(k, h, rtol=1e-10, atol=1e-10)


def test_the_default_tiles_of_large_tensors_give_the_plain_result():
    rule, plain = velo(**SMALL), velo(**SMALL, chunk_size=10**9)
    th = trees.cast(rule.init(), torch.float64)
    for shape in ((300, 250), (70000,)):
        p = torch.randn(shape, generator=fold_in(6), dtype=torch.float64)
        h = k = rule.init_hidden(th, p, num_steps=9)
        x = y = p
        for _ in range(2):
            x, h = rule.step(th, x, p, h, loss=scalar(1.0))
            y, k = plain.step(th, y, p, k, loss=scalar(1.0))
        torch.testing.assert_close((x, h), (y, k))


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_transform_never_meets_the_tiles(chunk_size):
    """With tiny tiles derivatives, batches and traces are those of the plain path."""
    rule, plain = velo(**SMALL, chunk_size=chunk_size), velo(**SMALL, chunk_size=10**9)
    th = trees.cast(rule.init(), torch.float64)
    generator = fold_in(5)
    p = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    g, v = (torch.randn(p.shape, generator=generator, dtype=p.dtype) for _ in range(2))

    def f(rule):
        def run(p, g):
            h = rule.init_hidden(th, p, num_steps=4)
            for t in range(2):
                p, h = rule.step(th, p, g * p, h, loss=scalar(2.0 - t))
            return p

        return run

    close = torch.testing.assert_close
    close(
        grad(lambda p: f(rule)(p, g).square().sum())(p),
        grad(lambda p: f(plain)(p, g).square().sum())(p),
    )
    close(jvp(f(rule), (p, g), (v, v)), jvp(f(plain), (p, g), (v, v)))
    stacked = torch.stack([g, v])
    got = vmap(f(rule), in_dims=(None, 0))(p, stacked)
    close(got, torch.stack([f(plain)(p, x) for x in stacked]))
    leaf = p.clone().requires_grad_()
    f(rule)(leaf, g).sum().backward()
    close(leaf.grad, grad(lambda p: f(plain)(p, g).sum())(p))
    close(make_fx(f(rule))(p, g)(v, g), f(plain)(v, g))


# -- derivatives and odd leaves ----------------------------------------------------------------


def test_meta_gradient_is_the_finite_difference_also_through_the_losses():
    rule = velo(**SMALL, weight_decay=0.1)
    th = trees.cast(rule.init(fold_in(1)), torch.float64)
    generator = fold_in(7)
    params, target = draw_tree(generator), draw_tree(generator)
    along = trees.map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), th)

    def meta(th):
        loss = lambda p, t: sum(((p[k] - t[k]) ** 2).sum() for k in p)
        batches = {k: torch.stack([v, v + 0.1, v - 0.2, v, v]) for k, v in target.items()}
        return fmeta.unroll(rule, loss, th, params, batches).losses.sum()

    gradient = grad(meta)(th)
    got = sum(
        (a * b).sum() for a, b in zip(trees.leaves(gradient), trees.leaves(along), strict=True)
    )
    e = 1e-7
    up, down = (meta(trees.map(lambda x, a, s=s: x + s * a, th, along)) for s in (e, -e))
    torch.testing.assert_close(got, (up - down) / (2 * e), rtol=1e-4, atol=1e-7)
    again = grad(lambda th: sum(x.square().sum() for x in trees.leaves(grad(meta)(th))))(th)
    assert all(torch.isfinite(x).all() for x in trees.leaves(again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-9])
def test_tiny_gradients_and_parameters_give_finite_meta_gradients_of_two_orders(size, dtype):
    rule = velo(**SMALL)
    th = trees.cast(rule.init(), dtype)
    p = {k: torch.full(s, size, dtype=dtype) for k, s in TREE.items()}

    def meta(th, p):
        q, h = p, rule.init_hidden(th, p, num_steps=3)
        for _ in range(3):
            q, h = rule.step(th, q, p, h, loss=sum(x.sum() for x in q.values()))
        return sum((x + 1).square().sum() for x in q.values())

    def again(th, p):
        return sum(x.sum() for x in trees.leaves(grad(meta, argnums=(0, 1))(th, p)))

    for f in (meta, again):
        for x in trees.leaves(grad(f, argnums=(0, 1))(th, p)):
            assert torch.isfinite(x).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_odd_leaves_on_meta_and_in_other_dtypes(dtype):
    rule = velo(**SMALL, chunk_size=4)
    th, p = rule.init(), draw_tree(fold_in(8), torch.float32)
    p = {k: v.to(dtype) for k, v in p.items()}
    h = rule.init_hidden(th, p, num_steps=4)
    loss = scalar(1.0, torch.float32)
    q, k = rule.step(th, p, p, h, loss=loss)
    assert all(torch.isfinite(x).all() for x in trees.leaves((q, k)))
    on_meta = trees.map(lambda x: x.to("meta"), (th, p, p, h))
    found = rule.step(*on_meta, loss=loss.to("meta"))
    for got, want in zip(trees.leaves(found), trees.leaves((q, k)), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


def test_stacked_leaves_equal_each_alone(monkeypatch):
    rule = velo(**SMALL)
    th, generator = rule.init(), fold_in(9)
    params = {str(i): torch.randn(3, 4, generator=generator) for i in range(5)}

    def step():
        h = rule.init_hidden(th, params, num_steps=3)
        return rule.step(th, params, params, h, loss=torch.tensor(1.0))

    stacked = step()
    for limits in (_groups.STACKED, _groups.TILES):
        monkeypatch.setitem(limits, "min_size", 10**9)
    torch.testing.assert_close(step(), stacked)


def test_the_state_keeps_its_order():
    """`torch.compile` takes a dict of another order for another one, and compiles again."""
    rule = velo(**SMALL)
    th, params = rule.init(), {"w": torch.ones(2, 3), "b": torch.ones(3)}
    hidden = rule.init_hidden(th, params, num_steps=3)
    new = rule.step(th, params, params, hidden, loss=torch.tensor(1.0))[1]
    for k in params:
        assert list(new.leaves[k]) == list(hidden.leaves[k])
    assert list(new.shared) == list(hidden.shared)


# -- formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 3), (1, 0)),
        ((3, 5), (0, 1)),
        ((6, 6), (1, 0)),
        ((2, 6, 6), (2, 1)),
        ((6, 2, 6), (2, 0)),
        ((4, 4, 3, 3), (0, 1)),
        ((3, 3, 4, 4), (3, 2)),
        ((4, 3, 3, 3), (3, 0)),
        ((2, 2, 2, 2), (3, 2)),
        ((1, 4, 4, 3, 3), (2, 1)),
    ],
    ids=str,
)
def test_which_axes_are_factored(shape, axes):
    """The last two of a stable sort, exchanged where they tie, but for the first two of four."""
    assert factored_axes(shape) == axes


def test_what_is_seen_of_a_tensor():
    generator = fold_in(10)
    draw = lambda: torch.randn(4, 1, 6, generator=generator, dtype=torch.float64)
    p, h = draw(), {"m0": draw(), "m1": draw(), "m2": draw(), "rms": draw().square()}
    s = 1 / p.square().mean().sqrt()
    log = lambda x: (1e-8 + 10 * x).log().clamp(-5, 5) / 2
    means, rms = [h[f"m{i}"].mean() * s for i in range(3)], h["rms"] * s
    want = [log(rms.mean()), *(log(h[f"m{i}"].var(correction=0) * s * s) for i in range(3))]
    want += [log((rms - m).square().mean()) for m in means]
    got = inputs(torch.zeros(18), summary(p, h)[None])[0]
    torch.testing.assert_close(got[18], want[0])
    torch.testing.assert_close(got[19:24], torch.tensor([0.0, 0, 1, 0, 0]).double())
    torch.testing.assert_close(got[24:], torch.stack(want[1:]))


@pytest.mark.parametrize("numel", [2**15 + 1, 100003])
def test_large_tensors_are_seen_as_small_ones_are(numel):
    generator = fold_in(11)
    draw = lambda: 3 + torch.randn(numel, generator=generator, dtype=torch.float64)
    p, h = draw(), {"m0": draw(), "m1": draw(), "m2": 1e-6 * draw(), "rms": draw().square()}
    plain = vmap(lambda x: summary(p, {**h, "m0": x}))(h["m0"][None])[0]  # not in chunks
    torch.testing.assert_close(summary(p, h), plain, rtol=1e-12, atol=1e-12)


def test_what_is_seen_of_the_training():
    """A loss that falls is at its lowest, one that jumps is bounded; nothing in two steps."""
    shared = {"t": torch.tensor(0), "num_steps": scalar(1000.0), **start_losses(scalar(1000.0))}
    seen = []
    for loss in (4.0, 3.0, 2.0, 1.5, 1e30):
        x, shared = training(shared, scalar(loss))
        seen.append(x)
    for t, x in enumerate(seen):
        want = torch.tanh(10 * (t / 1000 - scalar([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1, 1.1])))
        torch.testing.assert_close(x[:9], want)
    assert all((x[9:] == 0).all() for x in seen[:2])
    assert all((x[9:] == -1).all() for x in seen[2:4])
    assert (seen[4][9:] > -1).all()
    assert shared["losses"].max() < 10
    decay = math.exp(-1 / 1000)
    mean = 0.0
    for loss in (4.0, 3.0, 2.0, 1.5):
        mean = decay * mean + (1 - decay) * loss
    assert shared["lowest"][-1].item() == pytest.approx(mean / (1 - decay**4), rel=1e-10)


def test_lr_and_weight_decay_act_as_in_the_original():
    th = velo(**SMALL).init()
    p = torch.randn(3, 4, generator=fold_in(12))
    update = lambda **more: velo(**SMALL, **more).update(
        th, p, p, velo().init_hidden(th, p, num_steps=5), loss=torch.tensor(1.0)
    )[0]
    one = update()
    torch.testing.assert_close(update(lr=0.5), 0.5 * one)
    torch.testing.assert_close(update(lr=torch.tensor(0.5)), 0.5 * one)
    want = (p + 0.5 * one) * (1 - 0.5 * 0.1) - p
    torch.testing.assert_close(update(lr=0.5, weight_decay=0.1), want)


def test_weights_of_any_size_work_whatever_the_arguments():
    th = velo(lstm_hidden_size=3, param_inits=2, hidden_size=5, hidden_layers=3).init()
    assert {k: tuple(v.shape) for k, v in th["mlp"].items()} == {
        "w0": (2, 30, 5), "b0": (2, 5), "w1": (2, 5, 5), "b1": (2, 5), "w2": (2, 5, 5),
        "b2": (2, 5), "w3": (2, 5, 3), "b3": (2, 3),
    }  # fmt: skip
    assert tuple(th["rnn"]["lstm_w"].shape) == (6, 12)
    p = torch.randn(40, 30, generator=fold_in(13))
    steps = [
        rule.update(th, p, p, rule.init_hidden(th, p, num_steps=5), loss=torch.tensor(1.0))[0]
        for rule in (velo(), velo(chunk_size=100), velo(**{**SMALL, "exp_mult": 1e-3}))
    ]
    torch.testing.assert_close(steps[0], steps[1])
    assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in steps)


def test_loss_and_horizon_are_needed():
    rule, p = velo(**SMALL), torch.ones(2)
    th = rule.init()
    with pytest.raises(ValueError, match="needs num_steps"):
        rule.init_hidden(th, p)
    with pytest.raises(ValueError, match="needs the loss"):
        rule.step(th, p, p, rule.init_hidden(th, p, num_steps=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lstm_hidden_size": 0}, "lstm_hidden_size must be a positive integer, got 0"),
        ({"param_inits": True}, "param_inits must be a positive integer, got True"),
        ({"hidden_layers": 1.5}, "hidden_layers must be a positive integer, got 1.5"),
        ({"lr": -1.0}, "lr must be not negative"),
        ({"weight_decay": float("nan")}, "weight_decay must be not negative"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"initial_rms_decays": (0.9, 0.99)}, "initial_rms_decays must be 1 numbers from 0 to 1"),
        ({"initial_momentum_decays": (0.9, 0.99, 2)}, "initial_momentum_decays must be 3 numbers"),
    ],
    ids=str,
)
def test_senseless_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        velo(**arguments)
