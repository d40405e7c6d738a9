"""The hand-made rules are torch's, number for number, leaf by leaf."""

import pytest
import torch

import fmeta
from fmeta import optimizers, trees
from fmeta._roots import safe_sqrt
from fmeta.random import fold_in

STEPS = 50
SHAPES = {"a": (4, 3), "b": (3,), "c": (3,), "d": (3,), "e": (3,), "s": ()}  # "b" to "e" stack
SEEDS = dict(zip(SHAPES, range(6), strict=True))

# name: (ours, torch's), of the learning rate
PAIRS = {
    "sgd": (lambda lr: optimizers.sgd(lr), lambda p, lr: torch.optim.SGD(p, lr)),
    "sgd momentum": (
        lambda lr: optimizers.sgd(lr, momentum=0.9),
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    ),
    "sgd nesterov": (
        lambda lr: optimizers.sgd(lr, momentum=0.9, nesterov=True),
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    ),
    "rmsprop": (lambda lr: optimizers.rmsprop(lr), lambda p, lr: torch.optim.RMSprop(p, lr)),
    "rmsprop momentum": (
        lambda lr: optimizers.rmsprop(lr, alpha=0.9, eps=1e-6, momentum=0.8),
        lambda p, lr: torch.optim.RMSprop(p, lr, alpha=0.9, eps=1e-6, momentum=0.8),
    ),
    "rmsprop centered": (
        lambda lr: optimizers.rmsprop(lr, centered=True),
        lambda p, lr: torch.optim.RMSprop(p, lr, centered=True),
    ),
    "adam": (
        lambda lr: optimizers.adam(lr, betas=(0.8, 0.99), eps=1e-7),
        lambda p, lr: torch.optim.Adam(p, lr, betas=(0.8, 0.99), eps=1e-7),
    ),
    "adamw": (
        lambda lr: optimizers.adamw(lr, weight_decay=0.1),
        lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1),
    ),
}


def start(dtype):
    return {k: torch.randn(s, generator=fold_in(0, SEEDS[k])).to(dtype) for k, s in SHAPES.items()}


def gradients(params, t, absent=()):
    """Quadratic pull plus noise; at some steps some leaves have none."""
    return {
        k: None
        if k in absent
        else p + 0.3 * torch.randn(p.shape, generator=fold_in(1, t, SEEDS[k])).to(p.dtype)
        for k, p in params.items()
    }


def ours(rule, dtype, absent=lambda t: ()):
    params, hidden = start(dtype), None
    for t in range(STEPS):
        if hidden is None:
            hidden = rule.init_hidden({}, params)
        params, hidden = rule.step({}, params, gradients(params, t, absent(t)), hidden)
    return params, hidden


def torchs(make, dtype, absent=lambda t: ()):
    params = start(dtype)
    opt = make(list(params.values()))
    for t in range(STEPS):
        for k, g in gradients(params, t, absent(t)).items():
            params[k].grad = g
        opt.step()
    return params


def close(got, want, tol):
    for k in want:
        torch.testing.assert_close(got[k], want[k].detach(), rtol=tol, atol=tol, msg=k)


def rare(t):
    """Leaves without a gradient: each of several on a rhythm of its own."""
    return [k for k, every in (("a", 3), ("c", 2), ("e", 5), ("s", 4)) if t % every == 0]


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch_over_50_steps(name, dtype, tol):
    mine, theirs = PAIRS[name]
    close(ours(mine(0.02), dtype)[0], torchs(lambda p: theirs(p, 0.02), dtype), tol)


@pytest.mark.parametrize("name", PAIRS)
def test_leaves_without_gradient_are_skipped_as_in_torch(name):
    # Bias correction shows it: a leaf's own count must not advance.
    mine, theirs = PAIRS[name]
    got, hidden = ours(mine(0.02), torch.float64, rare)
    close(got, torchs(lambda p: theirs(p, 0.02), torch.float64, rare), 1e-12)
    if "count" in hidden.leaves["a"]:
        counts = {k: int(h["count"]) for k, h in hidden.leaves.items()}
        assert counts == {k: STEPS - sum(k in rare(t) for t in range(STEPS)) for k in SHAPES}


@pytest.mark.parametrize("name", PAIRS)
def test_scalar_tensors_are_numbers(name):
    mine, _ = PAIRS[name]
    tensor = torch.tensor(0.02, dtype=torch.float64)
    close(ours(mine(tensor), torch.float64)[0], ours(mine(0.02), torch.float64)[0], 1e-12)


@pytest.mark.parametrize("kind", ["numbers", "scalar tensors", "full tensors", "mixed"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_tree_of_rates_is_a_rate_for_each_leaf(name, kind):
    mine, theirs = PAIRS[name]
    rates = {k: 0.01 * (i + 1) for i, k in enumerate(SHAPES)}
    double = {"dtype": torch.float64}
    makers = {
        "numbers": lambda k, r: r,
        "scalar tensors": lambda k, r: torch.tensor(r, **double),
        "full tensors": lambda k, r: torch.full(SHAPES[k], r, **double),
        "mixed": lambda k, r: r if k in "ace" else torch.full(SHAPES[k], r, **double),
    }
    tree = {k: makers[kind](k, r) for k, r in rates.items()}
    want = torchs(
        lambda p: theirs(
            [{"params": [x], "lr": r} for x, r in zip(p, rates.values(), strict=True)], 0.02
        ),
        torch.float64,
    )
    close(ours(mine(tree), torch.float64)[0], want, 1e-12)


def test_betas_may_be_trees_and_tensors():
    double = {"dtype": torch.float64}
    b1 = {k: torch.full(s, 0.8, **double) for k, s in SHAPES.items()}
    rule = optimizers.adam(0.02, betas=(b1, torch.tensor(0.99, **double)), eps=1e-7)
    want = ours(PAIRS["adam"][0](0.02), torch.float64)[0]
    close(ours(rule, torch.float64)[0], want, 1e-12)


def test_a_momentum_given_as_a_tensor_keeps_a_buffer_and_is_differentiated():
    params, double = start(torch.float64), {"dtype": torch.float64}
    batches = torch.zeros(5, **double)
    loss = lambda p, b: sum((x - 1).square().sum() for x in p.values())

    def total(momentum):
        return fmeta.unroll(
            optimizers.sgd(0.1, momentum=momentum), loss, {}, params, batches
        ).losses.sum()

    zero = torch.tensor(0.0, **double)
    torch.testing.assert_close(total(zero), total(0.0))
    slope = torch.func.grad(total)(zero)
    numeric = (total(zero + 1e-6) - total(zero - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-6)


def test_per_parameter_sgd_multiplies_elementwise():
    params = start(torch.float64)
    rule = optimizers.per_parameter_sgd(params, lr=0.5)
    theta = {"lr": {k: torch.randn(p.shape, generator=fold_in(2)) for k, p in params.items()}}
    grads = gradients(params, 0)
    new, _ = rule.step(theta, params, grads, rule.init_hidden(theta, params))
    close(new, {k: p - theta["lr"][k].double() * grads[k] for k, p in params.items()}, 1e-12)
    assert all(torch.equal(r, torch.full_like(r, 0.5)) for r in rule.init()["lr"].values())


def test_per_parameter_sgd_starts_from_a_tree_of_numbers_or_tensors():
    params = {"w": torch.ones(2), "b": torch.ones(())}
    lr = {"w": torch.tensor([0.1, 0.2]), "b": 0.3}
    start_rates = optimizers.per_parameter_sgd(params, lr=lr).init()["lr"]
    assert start_rates["w"].tolist() == pytest.approx([0.1, 0.2])
    assert start_rates["b"].item() == pytest.approx(0.3)


def test_per_parameter_sgd_learns_an_own_rate_for_each_element():
    params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    rule = optimizers.per_parameter_sgd(params, lr=0.1)
    loss = lambda p, b: p["w"].square().sum() / 2
    meta = lambda th: loss(fmeta.unroll(rule, loss, th, params, torch.zeros(1)).params, None)
    # w (1 - a), so d/da w^2 (1 - a)^2 / 2 = -w^2 (1 - a)
    got = torch.func.grad(meta)(rule.init())["lr"]["w"]
    torch.testing.assert_close(got, -0.9 * params["w"].square())


def test_get_gives_every_builder():
    assert all(optimizers.get(name) is f for name, f in optimizers.BUILDERS.items())


def test_hand_made_rules_have_nothing_to_learn():
    assert all(trees.leaves(mine(0.1).init()) == [] for mine, _ in PAIRS.values())


def test_a_rate_of_another_shape_is_refused_by_path():
    params = {"w": torch.ones(2, 3), "v": torch.ones(2, 3)}
    rule = optimizers.sgd({"w": 0.1, "v": torch.ones(3)})  # would broadcast, differently if stacked
    with pytest.raises(ValueError, match=r"lr \(a tree\) at path v has shape \(3,\).*\(2, 3\)"):
        rule.step({}, params, params, rule.init_hidden({}, params))


def test_a_variance_that_rounding_makes_negative_is_none():
    """Of gradients that stay the same: the square of their mean may exceed the mean square."""
    g = torch.tensor([-1.0, 2.0, 700.0])
    rule = optimizers.rmsprop(1.0, 0.9, 0.0, centered=True, eps_root=1e-8)
    hidden = rule.init_hidden({}, torch.zeros(3))
    hidden.leaves.update(v=(1 - 1e-6) * g * g, a=g)
    delta, new = rule.update({}, torch.zeros(3), g, hidden)
    assert (new.leaves["v"] - new.leaves["a"].square() < -1e-7).all()
    torch.testing.assert_close(delta, -1e4 * g)
    slope = torch.func.grad(lambda g: rule.update({}, torch.zeros(3), g, hidden)[0].sum())(g)
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_a_square_beyond_float32_stops_the_coordinate_as_in_torch(name, like):
    """One NaN in the second moment, with a root of 0, would throw it to 1e24."""
    more = {"weight_decay": 0.01} if name == "adamw" else {}
    rule = getattr(optimizers, name)(1e-3, **more)
    p, q = torch.ones(3), torch.nn.Parameter(torch.ones(3))
    hidden, other = rule.init_hidden({}, p), like([q], lr=1e-3, **more)
    for size in (1.0, 1e25, 1.0, 1.0):
        g = torch.tensor([size, 1.0, -size])
        p, hidden = rule.step({}, p, g, hidden)
        q.grad = g
        other.step()
    torch.testing.assert_close(p, q.detach(), rtol=1e-6, atol=1e-6)


def test_the_root_of_nan_is_nan():
    x = torch.tensor([4.0, 0.0, -1.0, torch.nan, torch.inf])
    want = torch.tensor([2.0, 0.0, 0.0, torch.nan, torch.inf])
    torch.testing.assert_close(safe_sqrt(x), want, equal_nan=True)
