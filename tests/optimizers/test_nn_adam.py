"""nn_adam: Adam's formula while untrained, numbers of each tensor, their bounds and their decay."""

import math

import pytest
import torch

import fmeta
from fmeta import optimizers, trees
from fmeta.optimizers import _nn_adam, nn_adam
from fmeta.random import fold_in
from fmeta.testing import LAWS, check_optimizer

DOUBLE = {"dtype": torch.float64}
NUMBERS = ("lr", "beta1", "beta2", "epsilon")


def normal(*shape, key=0):
    return torch.randn(shape, generator=fold_in(29, key, *shape), **DOUBLE)


def start():
    return {"b": normal(3), "s": normal(), "w": normal(4, 3)}


def weights(rule, std=0.3):
    """Weights in float64 of which none is zero; the start as `init` gives it."""
    th = trees.cast(rule.init(), torch.float64)
    flat, spec = trees.flatten(th["rnn"])
    loud = [x + std * normal(*x.shape, key=i) for i, x in enumerate(flat)]
    return {**th, "rnn": trees.unflatten(spec, loud)}


def follow(rule, th, params, steps=5):
    hidden = rule.init_hidden(th, params)
    for t in range(steps):
        grads = {k: p + normal(*p.shape, key=t) for k, p in params.items()}
        params, hidden = rule.step(th, params, grads, hidden)
    return params, hidden


def by_hand(params, steps=5, lr=0.01, b1=0.8, b2=0.99, eps=1e-3):
    m = v = {k: torch.zeros_like(p) for k, p in params.items()}
    for t in range(steps):
        g = {k: p + normal(*p.shape, key=t) for k, p in params.items()}
        m = {k: b1 * m[k] + (1 - b1) * g[k] for k in params}
        v = {k: b2 * v[k] + (1 - b2) * g[k] ** 2 for k in params}
        step = {k: lr * (1 + eps) / (eps + (v[k] + 1e-10).sqrt()) * m[k] for k in params}
        params = {k: p - step[k] for k, p in params.items()}
    return params


def of(rule, name, hidden):
    """The numbers themselves, by tensor."""
    u = {k: state[name] for k, state in hidden.leaves.items()}
    return {
        k: torch.exp(10 * x) if name in ("lr", "epsilon") else 1 - torch.exp(10 * x)
        for k, x in u.items()
    }


def close(got, want, **tolerance):
    torch.testing.assert_close(got, want, **tolerance)


def test_all_laws_with_weights_that_are_not_zero():
    rule = nn_adam(
        output_scale=0.05, initial_learning_rate=0.01, decay_strength=0.1, lstm_hidden_size=5
    )
    loud = rule._replace(init=lambda generator=None: weights(rule))
    report = check_optimizer(loud, equivariance="coordinate", exclude=["compiles_once"])
    assert set(report.held) == set(LAWS) - {"compiles_once"}


def test_untrained_it_is_the_formula_with_its_start_values():
    rule = nn_adam(0.3, 0.01, 0.8, 0.99, 1e-3)
    th = trees.cast(rule.init(), torch.float64)
    close(follow(rule, th, start())[0], by_hand(start()), rtol=1e-5, atol=1e-7)


def test_with_a_large_epsilon_it_is_gradient_descent_with_momentum():
    rule = nn_adam(0.0, 0.01, 0.8, 0.99, 1e4)
    th = trees.cast(rule.init(), torch.float64)
    m, params = {k: torch.zeros_like(p) for k, p in start().items()}, start()
    for t in range(5):
        m = {k: 0.8 * m[k] + 0.2 * (p + normal(*p.shape, key=t)) for k, p in params.items()}
        params = {k: p - 0.01 * m[k] for k, p in params.items()}
    close(follow(rule, th, start())[0], params, rtol=1e-3, atol=1e-5)


def test_a_step_uses_the_numbers_from_before_the_network_moves_them():
    rule = nn_adam(output_scale=1.0, initial_learning_rate=0.01)
    still = trees.cast(rule.init(), torch.float64)
    one = [follow(rule, th, start(), 1)[0] for th in (weights(rule), still)]
    close(one[0], one[1], rtol=0, atol=0)
    two = [follow(rule, th, start(), 2)[0]["w"] for th in (weights(rule), still)]
    assert (two[0] - two[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", NUMBERS)
def test_every_tensor_has_numbers_of_its_own(name):
    rule = nn_adam(output_scale=0.05, initial_learning_rate=0.01)
    found = of(rule, name, follow(rule, weights(rule), start())[1])
    assert len({round(float(x), 12) for x in found.values()}) == 3


def test_with_full_decay_the_numbers_stay_at_their_start():
    moved, still = nn_adam(1.0, 0.01, decay_strength=1.0), nn_adam(0.0, 0.01)
    th = weights(moved)
    close(follow(moved, th, start())[0], follow(still, th, start())[0])


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["up", "down"])
def test_the_numbers_stay_within_their_bounds(direction):
    rule = nn_adam(output_scale=100.0)
    th = trees.cast(rule.init(), torch.float64)
    th["rnn"]["control_b"] = direction * torch.ones(4, **DOUBLE)
    params, hidden = follow(rule, th, start(), 3)
    assert all(bool(x.isfinite().all()) for x in trees.leaves((params, hidden)))
    ends = {"lr": (1e3, 1e-8), "epsilon": (1e4, 1e-11), "beta1": (0, 1 - math.exp(-10))}
    for name, (up, down) in {**ends, "beta2": ends["beta1"]}.items():
        for x in of(rule, name, hidden).values():
            assert float(x) == pytest.approx(up if direction > 0 else down, rel=1e-6, abs=1e-12)


def test_gradients_are_clamped_to_a_thousand():
    rule = nn_adam(initial_epsilon=1e3)  # Adam's own step would not tell
    th, params = rule.init(), {"w": torch.ones(3)}
    hidden = rule.init_hidden(th, params)
    step = lambda size: rule.update(th, params, {"w": size * torch.ones(3)}, hidden)[0]["w"]
    close(step(1e9), step(1e3))
    assert step(1e3).abs().max() > 1.5 * step(5e2).abs().max()


@pytest.mark.parametrize("size", [0.0, 1e-30, 3.0, 1e30])
def test_what_the_network_sees_of_a_tensor_is_bounded(size):
    p = size * torch.tensor([1.0, 2.0, -6.0], **DOUBLE)  # of mean -size, variance 38 / 3 size^2
    numbers = {"lr": -7.0, "beta1": 7.0, "beta2": -2.0, "epsilon": 1e3}  # of odd start weights
    h = {"m": p, "v": p * p, **{k: torch.tensor(x, **DOUBLE) for k, x in numbers.items()}}

    def log(x):
        return max(-5.0, min(5.0, math.log(1e-8 + abs(x)))) / 2

    mean, sign = log(size), -1.0 if size else 0.0
    square = 41 / 3 * size**2
    variance = (1 + 16 + 1296) / 3 * size**4 - square**2
    head = [1.0, -0.4, 1.0, 1.0, -1.0, -1.0]
    head += [mean, sign, log(3 * size), mean, sign, mean, sign, log(square), -sign]
    want = [*head, *[log(38 / 3 * size**2)] * 3, log(variance)]
    got = _nn_adam._features(p, p, h)
    close(got, torch.tensor(want, **DOUBLE), rtol=1e-9, atol=1e-12)
    assert got.abs().max() <= 2.5


def test_an_empty_tensor_is_finite():
    rule = nn_adam(output_scale=0.05)
    params = {**start(), "none": torch.zeros(2, 0, **DOUBLE)}
    new, hidden = follow(rule, weights(rule), params)
    assert all(bool(x.isfinite().all()) for x in trees.leaves((new, hidden)))
    assert new["none"].shape == (2, 0)


def test_a_tensor_without_gradient_keeps_its_numbers():
    rule = nn_adam(output_scale=0.05)
    th, params = weights(rule), start()
    hidden = rule.init_hidden(th, params)
    new, after = rule.step(th, params, {**params, "s": None}, hidden)
    assert new["s"] is params["s"]
    close(after.leaves["s"], hidden.leaves["s"], rtol=0, atol=0)
    assert not torch.equal(after.leaves["w"]["lr"], hidden.leaves["w"]["lr"])


def test_an_outer_loop_finds_a_larger_rate():
    rule = nn_adam(output_scale=0.05, initial_learning_rate=1e-3)
    outer, th = optimizers.adam(0.003), rule.init()
    state, target = outer.init_hidden({}, th), torch.linspace(-1, 1, 5)
    loss = lambda p, b: (p["w"] - target).square().mean()

    def meta(th):
        return fmeta.unroll(rule, loss, th, {"w": torch.zeros(5)}, torch.zeros(8)).losses[-1]

    first = meta(th)
    for _ in range(30):
        th, state = outer.step({}, th, torch.func.grad(meta)(th), state)
    assert meta(th) < 0.5 * first
    assert th["rnn"]["control_w"].abs().max() > 0
    assert th["start"]["lr"] > rule.init()["start"]["lr"]


def test_every_weight_is_learned():
    rule = nn_adam(output_scale=0.05, initial_learning_rate=0.01)
    meta = lambda th: torch.stack(
        [x.square().sum() for x in follow(rule, th, start())[0].values()]
    ).sum()
    grads = torch.func.grad(meta)(weights(rule))
    for path, g in zip(trees.paths(grads), trees.leaves(grads), strict=True):
        assert g.abs().max() > 0, path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"initial_learning_rate": 0.0}, "initial_learning_rate must be positive"),
        ({"initial_epsilon": 0.0}, "initial_epsilon must be positive"),
        ({"initial_beta1": 1.0}, "initial_beta1 must be not negative and below 1"),
        ({"output_scale": -1.0}, "output_scale must be not negative"),
        ({"decay_strength": math.nan}, "decay_strength must be not negative"),
        ({"lstm_hidden_size": 0}, "lstm_hidden_size must be a positive integer, got 0"),
        ({"lstm_hidden_size": 8.0}, "lstm_hidden_size must be a positive integer, got 8.0"),
    ],
)
def test_arguments_that_cannot_be_meant_are_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        nn_adam(**arguments)
