"""More hand-made rules: torch's numbers, and those of NumPy programs of one tensor."""

import functools
import math

import numpy as np
import pytest
import torch

import fmeta
from fmeta import optimizers
from fmeta.random import fold_in

from .test_hand_made import SHAPES, STEPS, close, gradients, ours, rare, start, torchs

DOUBLE = {"dtype": torch.float64}


def nadam_of_torch(params, lr, *args, **more):
    """torch.optim.NAdam whose product of momenta is in float64 (its own is in float32)."""
    opt = torch.optim.NAdam(params, lr, *args, **more)
    for p in (p for group in opt.param_groups for p in group["params"]):
        opt.state[p] = {
            "step": torch.tensor(0.0),
            "mu_product": torch.ones((), **DOUBLE),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return opt


# name: (ours, torch's), of the learning rate
PAIRS = {
    "adagrad": (lambda lr: optimizers.adagrad(lr), lambda p, lr: torch.optim.Adagrad(p, lr)),
    "adagrad, all arguments": (
        lambda lr: optimizers.adagrad(lr, 0.1, 0.2, 0.3, 1e-3),
        lambda p, lr: torch.optim.Adagrad(p, lr, 0.1, 0.2, 0.3, 1e-3),
    ),
    "adamax": (lambda lr: optimizers.adamax(lr), lambda p, lr: torch.optim.Adamax(p, lr)),
    "adamax, all arguments": (
        lambda lr: optimizers.adamax(lr, (0.8, 0.9), 1e-3, 0.1),
        lambda p, lr: torch.optim.Adamax(p, lr, (0.8, 0.9), 1e-3, 0.1),
    ),
    "nadam": (lambda lr: optimizers.nadam(lr), lambda p, lr: nadam_of_torch(p, lr)),
    "nadam, all arguments": (
        lambda lr: optimizers.nadam(lr, (0.8, 0.99), 1e-3, 0.1, 0.02),
        lambda p, lr: nadam_of_torch(p, lr, (0.8, 0.99), 1e-3, 0.1, 0.02),
    ),
    "nadamw": (
        lambda lr: optimizers.nadamw(lr, weight_decay=0.1, momentum_decay=4e-3),
        lambda p, lr: nadam_of_torch(p, lr, weight_decay=0.1, decoupled_weight_decay=True),
    ),
    "radam": (lambda lr: optimizers.radam(lr), lambda p, lr: torch.optim.RAdam(p, lr)),
    "radam, all arguments": (
        lambda lr: optimizers.radam(lr, (0.8, 0.9), 1e-3, 0.1),
        lambda p, lr: torch.optim.RAdam(p, lr, (0.8, 0.9), 1e-3, 0.1),
    ),
    "radam, decoupled": (
        lambda lr: optimizers.radam(lr, (0.8, 0.9), 1e-3, 0.1, True),
        lambda p, lr: torch.optim.RAdam(p, lr, (0.8, 0.9), 1e-3, 0.1, True),
    ),
    "radam, never rectified": (
        lambda lr: optimizers.radam(lr, (0.8, 0.5)),
        lambda p, lr: torch.optim.RAdam(p, lr, (0.8, 0.5)),
    ),
    "adafactor": (
        lambda lr: optimizers.adafactor(lr, 1, relative_step=True, axes="last"),
        lambda p, lr: torch.optim.Adafactor(p, lr, eps=(1e-16, 1e-3)),
    ),
}


def decayed_adafactor(lr, decay=0.1, d=1.5):
    return optimizers.adafactor(
        lr,
        1,
        0.7,
        d,
        weight_decay=lr * decay,
        eps=(0.0, 0.1),
        relative_step=True,
        axes="last",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch_over_50_steps(name, dtype):
    mine, theirs = PAIRS[name]
    # torch computes the lengths of RAdam's averages as Python numbers.
    single = 1e-4 if name == "radam" else 3e-5
    tol = 1e-12 if dtype == torch.float64 else single
    close(ours(mine(0.02), dtype)[0], torchs(lambda p: theirs(p, 0.02), dtype), tol)


@pytest.mark.parametrize("name", PAIRS)
def test_leaves_without_gradient_are_skipped_as_in_torch(name):
    mine, theirs = PAIRS[name]
    got, _ = ours(mine(0.02), torch.float64, rare)
    close(got, torchs(lambda p: theirs(p, 0.02), torch.float64, rare), 1e-12)


@pytest.mark.parametrize("kind", ["numbers", "scalar tensors", "full tensors", "mixed"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_tree_of_rates_is_a_rate_for_each_leaf(name, kind):
    mine, theirs = PAIRS[name]
    rates = {k: 0.01 * (i + 1) for i, k in enumerate(SHAPES)}
    makers = {
        "numbers": lambda k, r: r,
        "scalar tensors": lambda k, r: torch.tensor(r, **DOUBLE),
        "full tensors": lambda k, r: torch.full(SHAPES[k], r, **DOUBLE),
        "mixed": lambda k, r: r if k in "ace" else torch.full(SHAPES[k], r, **DOUBLE),
    }
    want = torchs(
        lambda p: theirs(
            [{"params": [x], "lr": r} for x, r in zip(p, rates.values(), strict=True)], 0.02
        ),
        torch.float64,
    )
    tree = {k: makers[kind](k, r) for k, r in rates.items()}
    close(ours(mine(tree), torch.float64)[0], want, 1e-12)


def test_adafactor_of_torch_with_all_arguments_and_the_last_axes():
    torch_rule = lambda p: torch.optim.Adafactor(p, 0.3, -0.7, (1e-16, 0.1), 1.5, 0.1)
    close(ours(decayed_adafactor(0.3), torch.float64)[0], torchs(torch_rule, torch.float64), 1e-12)
    kernel = torch.randn(4, 3, 2, generator=fold_in(5), **DOUBLE)
    noise = torch.randn(6, *kernel.shape, generator=fold_in(6), **DOUBLE)
    theirs = kernel.clone()
    opt, rule, p = torch_rule([theirs]), decayed_adafactor(0.3), kernel
    h = rule.init_hidden({}, p)
    for g in noise:
        theirs.grad = g
        opt.step()
        p, h = rule.step({}, p, g, h)
    torch.testing.assert_close(p, theirs, rtol=1e-12, atol=1e-12)


# ---- programs of one tensor in NumPy: state, gradient, parameter, t from 1 -> update ------------


def averages(s, g, t, b1, b2, square=None):
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    x = g * g if square is None else square(s["m"])
    s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * x
    return s["m"] / (1 - b1**t), s["v"] / (1 - b2**t)


def norm(x):
    return np.sqrt((x * x).sum())


def rms(x):
    return np.sqrt((x * x).mean())


def lion(s, g, p, t):
    m = s.get("m", 0.0)
    s["m"] = 0.95 * m + 0.05 * g
    return -0.02 * (np.sign(0.8 * m + 0.2 * g) + 0.1 * p)


def nadamw(s, g, p, t):
    _, v = averages(s, g, t, 0.8, 0.99)
    m = 0.8 * s["m"] / (1 - 0.8 ** (t + 1)) + 0.2 * g / (1 - 0.8**t)
    return -0.02 * (m / (np.sqrt(v) + 1e-6) + 0.1 * p)


def radam(s, g, p, t):
    m, v = averages(s, g, t, 0.8, 0.9)
    most = 2 / 0.1 - 1
    n = most - 2 * t * 0.9**t / (1 - 0.9**t)
    if n <= 4.5:
        return -0.02 * m
    r = math.sqrt((n - 4) * (n - 2) * most / ((most - 4) * (most - 2) * n))
    return -0.02 * r * m / (np.sqrt(v + 1e-4) + 1e-3)


def adabelief(s, g, p, t):
    m, _ = averages(s, g, t, 0.8, 0.99, lambda m: (g - m) ** 2)
    s["v"] = s["v"] + 1e-6
    return -0.02 * m / (np.sqrt(s["v"] / (1 - 0.99**t)) + 1e-4)


def yogi(s, g, p, t):
    m, v, x = s.get("m", 0.1), s.get("v", 0.1), g * g
    s["m"] = m = 0.8 * m + 0.2 * g
    s["v"] = v = np.where(v > x, v - 0.01 * x, np.where(v < x, v + 0.01 * x, v))
    return -0.02 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.99**t) + 1e-5) + 1e-2)


def lamb(s, g, p, t):
    m, v = averages(s, g, t, 0.8, 0.99)
    u = m / (np.sqrt(v + 1e-5) + 1e-4) + 0.1 * p
    return -0.02 * norm(p) / norm(u) * u


def lars(s, g, p, t, nesterov=True):
    u = g + 0.1 * p
    u = -0.5 * 0.01 * norm(p) / (norm(u) + 1e-2) * u
    s["m"] = u + 0.8 * s.get("m", 0.0)
    return u + 0.8 * s["m"] if nesterov else s["m"]


def rmsprop(s, g, p, t):
    s["a"] = 0.9 * s.get("a", 0.0) + 0.1 * g
    s["v"] = 0.9 * s.get("v", 0.0) + 0.1 * g * g
    u = -0.02 * g / (np.sqrt(s["v"] - s["a"] ** 2 + 1e-3) + 1e-4)
    s["m"] = u + 0.8 * s.get("m", 0.0)
    return u + 0.8 * s["m"]


def adafactor(s, g, p, t):
    w, x = t**-0.7, g * g + 1e-3
    if g.ndim > 1:
        s["row"] = (1 - w) * s.get("row", 0.0) + w * x.mean(1)
        s["col"] = (1 - w) * s.get("col", 0.0) + w * x.mean(0)
        v = np.outer(s["row"], s["col"]) / s["row"].mean()
    else:
        v = s["v"] = (1 - w) * s.get("v", 0.0) + w * x
    u = g / np.sqrt(v)
    u = 0.02 * u / max(1.0, rms(u) / 0.5) * max(rms(p), 0.1)
    s["m"] = 0.8 * s.get("m", 0.0) + 0.2 * u
    return -(s["m"] + 0.1 * p)


def schedule_free(s, g, y, t):
    """Algorithm 1 with all three sequences."""
    z, x = s.get("z", y), s.get("x", y)
    s["v"] = 0.99 * s.get("v", 0.0) + 0.01 * g * g
    warmth = min(1.0, t / 7)
    z = z - 0.02 * warmth * (g / (np.sqrt(s["v"] / (1 - 0.99**t)) + 1e-6) + 0.1 * y)
    weight = t**0.5 * (0.02 * warmth) ** 1.5
    s["sum"] = s.get("sum", 0.0) + weight
    x = x + weight / s["sum"] * (z - x)
    s.update(z=z, x=x)
    return 0.2 * z + 0.8 * x - y


PROGRAMS = {
    "lion": (lion, optimizers.lion(0.02, (0.8, 0.95), 0.1)),
    "nadamw": (nadamw, optimizers.nadamw(0.02, (0.8, 0.99), 1e-6, 0.1)),
    "radam": (
        radam,
        optimizers.radam(0.02, (0.8, 0.9), 1e-3, eps_root=1e-4, threshold=4.5, corrected_eps=True),
    ),
    "adabelief": (adabelief, optimizers.adabelief(0.02, (0.8, 0.99), 1e-4, 1e-6)),
    "yogi": (yogi, optimizers.yogi(0.02, (0.8, 0.99), 1e-2, 1e-5, 0.1)),
    "lamb": (lamb, optimizers.lamb(0.02, (0.8, 0.99), 1e-4, 0.1, 1e-5)),
    "lars": (lars, optimizers.lars(0.5, 0.8, 0.1, 0.01, 1e-2, nesterov=True)),
    "lars without Nesterov": (
        functools.partial(lars, nesterov=False),
        optimizers.lars(0.5, 0.8, 0.1, 0.01, 1e-2),
    ),
    "rmsprop": (
        rmsprop,
        optimizers.rmsprop(0.02, 0.9, 1e-4, 0.8, True, eps_root=1e-3, nesterov=True),
    ),
    "adafactor": (adafactor, optimizers.adafactor(0.02, 2, 0.7, 0.5, 0.8, 0.1, (1e-3, 0.1))),
    "schedule_free_adamw": (
        schedule_free,
        optimizers.schedule_free_adamw(0.02, (0.8, 0.99), 1e-6, 0.1, 7, 0.5, 1.5),
    ),
}


def numpys(program):
    params, states = start(torch.float64), {k: {} for k in SHAPES}
    for t in range(STEPS):
        for k, g in gradients(params, t).items():
            p = params[k].numpy()
            params[k] = torch.as_tensor(p + program(states[k], g.numpy(), p, t + 1))
    return params, states


@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_a_program_of_one_tensor(name):
    program, rule = PROGRAMS[name]
    close(ours(rule, torch.float64)[0], numpys(program)[0], 1e-12)


def test_schedule_free_evaluates_with_the_average():
    program, rule = PROGRAMS["schedule_free_adamw"]
    params, hidden = ours(rule, torch.float64)
    average = {k: torch.as_tensor(s["x"]) for k, s in numpys(program)[1].items()}
    close(rule.eval_params({}, params, hidden), average, 1e-12)
    share = {k: torch.full(s, 0.8, **DOUBLE) for k, s in SHAPES.items()}
    by_tree = optimizers.schedule_free_adamw(betas=(share, 0.99))
    close(by_tree.eval_params({}, params, hidden), average, 1e-12)


def test_schedule_free_keeps_the_parameters_dtype_and_untouched_leaves():
    params = {"w": torch.randn(4, generator=fold_in(0)).bfloat16(), "x": torch.ones(2), "n": None}
    rule = optimizers.schedule_free_adamw(0.1, warmup_steps=3)
    h = rule.init_hidden({}, params)
    grads = {"w": torch.ones(4), "x": None, "n": None}
    new, h = rule.step({}, params, grads, h)
    shown = rule.eval_params({}, new, h)
    assert shown["w"].dtype == torch.bfloat16
    assert torch.equal(shown["x"], params["x"])
    assert shown["n"] is None
    assert h.leaves["w"]["z"].dtype == torch.float32


def test_schedule_free_with_a_weight_for_each_coordinate():
    power = {k: torch.full(s, 0.5, **DOUBLE) for k, s in SHAPES.items()}
    rule = optimizers.schedule_free_adamw(0.02, (0.8, 0.99), 1e-6, 0.1, 7, power, 1.5)
    close(ours(rule, torch.float64)[0], numpys(schedule_free)[0], 1e-12)


def test_nadam_with_betas_for_each_coordinate():
    b1 = {k: torch.full(s, 0.8, **DOUBLE) for k, s in SHAPES.items()}
    want = ours(optimizers.nadam(0.02, (0.8, 0.99)), torch.float64)[0]
    close(ours(optimizers.nadam(0.02, (b1, 0.99)), torch.float64)[0], want, 1e-12)


# ---- adafactor's axes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "arguments", "row", "col"),
    [
        ((4, 6), {"min_dim_size_to_factor": 4}, (4,), (6,)),
        ((6, 4), {"min_dim_size_to_factor": 4}, (4,), (6,)),
        ((6, 3, 5, 2), {"min_dim_size_to_factor": 5}, (3, 5, 2), (6, 3, 2)),
        ((6, 3, 5, 2), {"min_dim_size_to_factor": 1, "axes": "last"}, (6, 3, 5), (6, 3, 2)),
    ],
)
def test_adafactor_keeps_a_mean_over_each_of_two_axes(shape, arguments, row, col):
    p = torch.ones(shape)
    state = optimizers.adafactor(**arguments).init_hidden({}, p).leaves
    assert (state["row"].shape, state["col"].shape) == (row, col)
    assert set(state) == {"row", "col", "count"}


@pytest.mark.parametrize("shape", [(127, 200), (200,), (), (0, 3)])
def test_adafactor_keeps_small_tensors_whole(shape):
    state = optimizers.adafactor().init_hidden({}, torch.ones(shape)).leaves
    assert state["v"].shape == shape


# ---- derivatives and zeros ----------------------------------------------------------------------


BUILT = {
    name: getattr(optimizers, name)
    for name in (
        *("adabelief", "adafactor", "adagrad", "adamax", "lamb", "lars", "lion", "nadam"),
        *("nadamw", "radam", "schedule_free_adamw", "yogi"),
    )
}


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_trust_ratio_with_a_norm_of_zero_is_one(name):
    rule = BUILT[name](0.1)
    zero, one = torch.zeros(3, **DOUBLE), torch.ones(3, **DOUBLE)
    moved = lambda p, g: rule.step({}, p, g, rule.init_hidden({}, p))[0] - p
    assert torch.equal(moved(one, zero), zero)
    # From zero, LAMB takes Adam's step and LARS the gradient's: 0.1 in both.
    torch.testing.assert_close(moved(zero, one), -0.1 * one, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*BUILT, "adafactor, factored", "radam, rectified"])
def test_derivatives_at_zero_are_finite_up_to_the_third(name, dtype):
    rule = {
        "adafactor, factored": optimizers.adafactor(0.1, 1),
        "radam, rectified": optimizers.radam(0.1, (0.9, 0.9)),
    }.get(name) or BUILT[name](0.1)
    zeros = torch.zeros(2, 3, dtype=dtype)

    def end(x):
        p, h = zeros + 0 * x, rule.init_hidden({}, zeros)
        for t in range(7):
            p, h = rule.step({}, p, (t == 6) * x * zeros, h)
        return (p + 1).square().sum()

    values = end
    for _ in range(3):
        values = (lambda f: lambda x: torch.func.grad(f)(x).sum())(values)
        assert values(torch.ones(2, 3, dtype=dtype)).isfinite()
    slope = torch.func.jvp(torch.func.grad(end), (zeros,), (zeros + 1,))[1]
    assert slope.isfinite().all()


LEARNED = {
    "adagrad": {"lr": "log", "lr_decay": "log"},
    "nadam": {"lr": "log", "momentum_decay": "log", "betas": "log1m"},
    "radam": {"lr": "log", "betas": "log1m"},
    "lamb": {"lr": "log", "weight_decay": "log"},
    "lars": {"lr": "log", "trust_coefficient": "log"},
    "schedule_free_adamw": {"lr": "log", "warmup_steps": "log", "betas": "log1m"},
    "adafactor": {"lr": "log", "decay_rate": "log", "clipping_threshold": "log", "eps": "log"},
    "yogi": {"lr": "log", "betas": "log1m", "eps": "log"},
}
STARTS = {
    "adagrad": {"lr_decay": 0.1},
    "radam": {"betas": (0.9, 0.9)},
    "lamb": {"weight_decay": 0.1},
    "schedule_free_adamw": {"warmup_steps": 4.5},
    "adafactor": {"clipping_threshold": 0.7, "eps": (1e-3, 1e-3), "min_dim_size_to_factor": 2},
}
STEP = (1e-6, -1e-6)


@pytest.mark.parametrize("name", LEARNED)
def test_numbers_can_be_learned(name):
    rule = fmeta.learn(BUILT[name], LEARNED[name], lr=0.05, **STARTS.get(name, {}))
    start = {"w": torch.randn(3, 2, generator=fold_in(8), **DOUBLE), "b": torch.ones(2, **DOUBLE)}
    noise = torch.randn(8, generator=fold_in(9), **DOUBLE)
    loss = lambda p, n: sum((x - n).square().sum() for x in p.values())

    def meta(th):
        return fmeta.unroll(rule, loss, th, start, noise).losses.sum()

    th = fmeta.trees.cast(rule.init(), torch.float64)
    grads = fmeta.trees.leaves(torch.func.grad(meta)(th))
    flat, spec = fmeta.trees.flatten(th)
    for i, (x, g) in enumerate(zip(flat, grads, strict=True)):
        ends = [fmeta.trees.unflatten(spec, [*flat[:i], x + e, *flat[i + 1 :]]) for e in STEP]
        numeric = (meta(ends[0]) - meta(ends[1])) / (STEP[0] - STEP[1])
        torch.testing.assert_close(g, numeric, rtol=1e-5, atol=1e-7)


# ---- numbers that cannot be meant ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: optimizers.lion(-1.0), "lr must be not negative"),
        (lambda: optimizers.lion(betas=0.9), "betas must be a pair, got 0.9"),
        (lambda: optimizers.nadam(betas=(0.9, 1.0)), r"betas\[1\] must be"),
        (lambda: optimizers.nadam(momentum_decay=-1.0), "momentum_decay must be not negative"),
        (lambda: optimizers.radam(threshold=3.0), "threshold must be at least 4, got 3.0"),
        (lambda: optimizers.lars(momentum=1.0), "momentum must be not negative and below 1"),
        (lambda: optimizers.rmsprop(nesterov=True), "nesterov=True needs a momentum above 0"),
        (lambda: optimizers.adafactor(axes="first"), "axes must be one of largest, last"),
        (lambda: optimizers.adafactor(min_dim_size_to_factor=0), "an integer from 1, got 0"),
        (lambda: optimizers.adafactor(eps=1e-30), "eps must be a pair, got 1e-30"),
        (lambda: optimizers.adafactor(clipping_threshold=0.0), "clipping_threshold must be pos"),
        (lambda: optimizers.adafactor(decay_rate={"w": torch.ones(2)}), "one number a tensor"),
        (lambda: optimizers.schedule_free_adamw(betas=(0.0, 0.9)), r"betas\[0\] must be above 0"),
    ],
)
def test_numbers_that_cannot_be_meant_are_errors(build, words):
    with pytest.raises(ValueError, match=words):
        build()
