"""`learn`: hyper-parameters in a coordinate where any number is allowed."""

import math

import pytest
import torch
from torch.func import grad, vmap

import fmeta
from fmeta import optimizers, trees

DOUBLE = {"dtype": torch.float64}
PARAMS = {"w": torch.tensor([1.0, -2.0, 3.0], **DOUBLE), "b": torch.tensor(0.5, **DOUBLE)}
BATCHES = torch.linspace(-1, 1, 6, **DOUBLE)


def loss(p, x):
    return sum((q - x).square().sum() for q in p.values())


def losses(rule, opt_params):
    return fmeta.unroll(rule, loss, opt_params, PARAMS, BATCHES).losses


@pytest.mark.parametrize(
    ("transform", "coordinate"),
    [
        ("linear", lambda x: x),
        ("log", math.log),
        ("log1m", lambda x: math.log(1 - x)),
        ("logit", lambda x: math.log(x / (1 - x))),
    ],
)
def test_each_transform_and_its_inverse(transform, coordinate):
    rule = fmeta.learn(optimizers.sgd, {"lr": transform}, lr=0.2)
    start = rule.init()["lr"]
    assert start.item() == pytest.approx(coordinate(0.2), rel=1e-6)
    at = {"lr": torch.tensor(coordinate(0.2), **DOUBLE)}
    torch.testing.assert_close(losses(rule, at), losses(optimizers.sgd(0.2), {}))


@pytest.mark.parametrize("transform", ["linear", "log", "log1m", "logit"])
def test_the_slope_is_that_of_the_number_by_the_chain_rule(transform):
    by_number = grad(lambda lr: losses(optimizers.sgd(lr), {}).sum())(torch.tensor(0.2, **DOUBLE))
    chain = {"linear": 1, "log": 0.2, "log1m": -0.8, "logit": 0.2 * 0.8}[transform]
    rule = fmeta.learn(optimizers.sgd, {"lr": transform}, lr=torch.tensor(0.2, **DOUBLE))
    got = grad(lambda th: losses(rule, th).sum())(rule.init())["lr"]
    torch.testing.assert_close(got, chain * by_number)


def test_what_is_not_given_takes_the_builders_default():
    rule = fmeta.learn(optimizers.adam, {"betas": "log1m", "eps": "log"}, lr=0.1)
    assert rule.init()["eps"].item() == pytest.approx(math.log(1e-8))
    assert [x.item() for x in rule.init()["betas"]] == pytest.approx(
        [math.log(0.1), math.log(1e-3)], rel=1e-6
    )
    got = losses(rule, trees.cast(rule.init(), torch.float64))
    torch.testing.assert_close(got, losses(optimizers.adam(0.1), {}), rtol=1e-5, atol=1e-6)


def test_numbers_become_float32_and_tensors_keep_their_dtype():
    number = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.1).init()["lr"]
    tensor = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=torch.tensor(0.1, **DOUBLE)).init()
    assert number.dtype is torch.float32
    assert tensor["lr"].dtype is torch.float64


def test_a_beta_near_1_is_right_to_float32():
    beta = fmeta.learn(optimizers.adam, {"betas": "log1m"}).init()["betas"][1]
    assert -torch.expm1(beta) == torch.tensor(0.999)
    assert beta.exp().item() == pytest.approx(1e-3, rel=1e-6)


def test_every_element_of_a_tree_is_learned():
    rates = {"w": torch.full((3,), 0.25, **DOUBLE), "b": 0.5}
    rule = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=rates)
    start = rule.init()["lr"]
    assert start["w"].shape == (3,)
    slope = grad(lambda th: losses(rule, th).sum())(trees.cast(rule.init(), torch.float64))["lr"]
    assert slope["w"].shape == (3,)
    assert (slope["w"] != 0).all()
    want = losses(optimizers.sgd(rates), {})
    torch.testing.assert_close(losses(rule, trees.cast(rule.init(), torch.float64)), want)


def test_constants_stay_constants():
    rule = fmeta.learn(optimizers.adam, {"lr": "log"}, lr=0.1, betas=(0.5, 0.6), eps_root=1e-8)
    assert set(rule.init()) == {"lr"}
    got = losses(rule, {"lr": torch.tensor(0.1, **DOUBLE).log()})
    want = losses(optimizers.adam(0.1, betas=(0.5, 0.6), eps_root=1e-8), {})
    torch.testing.assert_close(got, want)


def test_init_hidden_fits_the_learned_momentum():
    rule = fmeta.learn(optimizers.sgd, {"momentum": "linear"}, momentum=0.0)
    hidden = rule.init_hidden(rule.init(), PARAMS)  # a momentum that can move needs its buffer
    assert hidden.leaves["w"]["m"].shape == (3,)


def test_needs_and_eval_params_are_the_builders():
    def builder(lr=0.1):
        base = optimizers.sgd(lr)
        return base._replace(
            needs=frozenset({"loss"}),
            eval_params=lambda th, p, h: trees.map(lambda x: x + lr, p),
        )

    rule = fmeta.learn(builder, {"lr": "linear"}, lr=0.25)
    assert rule.needs == {"loss"}
    assert rule.eval_params(rule.init(), {"b": torch.zeros(())}, None)["b"] == 0.25


def test_a_sweep_by_vmap_equals_one_by_one():
    rule = fmeta.learn(optimizers.adam, {"lr": "log"})
    rates = torch.tensor([-3.0, -1.0], **DOUBLE)
    got = vmap(lambda lr: losses(rule, {"lr": lr}))(rates)
    want = torch.stack([losses(rule, {"lr": lr}) for lr in rates])
    torch.testing.assert_close(got, want)


def test_a_builder_of_ones_own_and_a_keyword_only_argument():
    def builder(*, rate):
        return optimizers.sgd(rate)

    rule = fmeta.learn(builder, {"rate": "linear"}, rate=0.5)
    assert rule.init()["rate"] == 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fmeta.learn(optimizers.adam, {"lrr": "log"}), "adam has no argument 'lrr'.*lr, b"),
        (lambda: fmeta.learn(optimizers.adam, {}, decay=1), "adam has no argument 'decay'"),
        (
            lambda: fmeta.learn(optimizers.adam, {"lr": "exp"}),
            "unknown transform 'exp' for 'lr': choose of linear, log, log1m, logit",
        ),
        (
            lambda: fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.0),
            'lr = 0.0 is not positive.*"log"',
        ),
        (
            lambda: fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=math.nan),
            "lr = nan is not positive",
        ),
        (
            lambda: fmeta.learn(optimizers.adam, {"betas": "log1m"}, betas=(0.9, 1.0)),
            "betas = 1.0 is not below 1",
        ),
        (
            lambda: fmeta.learn(optimizers.sgd, {"lr": "logit"}, lr=1.5),
            "lr = 1.5 is not between 0 and 1",
        ),
        (
            lambda: fmeta.learn(optimizers.sgd, {"nesterov": "linear"}, momentum=0.9),
            "'nesterov' cannot be learned: its start value is False",
        ),
        (
            lambda: fmeta.learn(lambda rate: optimizers.sgd(rate), {"rate": "log"}),
            r"no default for 'rate': give learn\(\.\.\., rate=\.\.\.\)",
        ),
        (
            lambda: fmeta.learn(optimizers.linear, {"lr": "log"}),
            "linear has learned parameters of its own",
        ),
    ],
)
def test_what_cannot_be_learned_is_said_at_once(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_transform_is_inverted_in_the_parameters_dtype():
    # In float32, 1 - exp(u) would be rounded to 24 bits before it met float64 parameters.
    u = torch.tensor(math.log(1e-3))
    rule = fmeta.learn(optimizers.adam, {"betas": "log1m"}, betas=(0.9, 0.999))
    th = {"betas": (torch.tensor(math.log(0.1)), u)}
    ones = {k: torch.ones_like(p) for k, p in PARAMS.items()}
    _, hidden = rule.step(th, PARAMS, ones, rule.init_hidden(th, PARAMS))
    want = math.exp(u.item())
    assert hidden.leaves["w"]["v"].tolist() == pytest.approx([want] * 3, rel=1e-13)


def test_values_in_a_wider_dtype_than_the_parameters_keep_it():
    seen = []

    def builder(rate=0.5):
        seen.append(rate)
        return optimizers.sgd(rate)

    rule = fmeta.learn(builder, {"rate": "log"})
    params = trees.cast(PARAMS, torch.float32)
    rule.init_hidden(trees.cast(rule.init(), torch.float64), params)
    assert seen[-1].dtype == torch.float64
    rule.init_hidden(rule.init(), params)
    assert seen[-1].dtype == torch.float32


@pytest.mark.parametrize("transform", ["linear", "log", "log1m", "logit"])
def test_every_init_is_a_copy(transform):
    lr = torch.tensor(0.25)
    rule = fmeta.learn(optimizers.sgd, {"lr": transform}, lr=lr)
    first = rule.init()
    want = first["lr"].item()
    first["lr"].add_(1)
    assert rule.init()["lr"].item() == want
    assert lr.item() == 0.25
    lr.zero_()
    assert rule.init()["lr"].item() == want


def test_a_start_may_be_traced():
    def first_loss(lr):
        rule = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=lr)
        return losses(rule, rule.init())[1]

    rates = torch.tensor([0.1, 0.2], **DOUBLE)
    slopes = vmap(grad(first_loss))(rates)
    for slope, rate in zip(slopes, rates, strict=True):
        x = rate.clone().requires_grad_()
        (want,) = torch.autograd.grad(first_loss(x), x)
        torch.testing.assert_close(slope, want)
    # batched ones are not looked at, whatever they hold
    got = vmap(lambda lr: fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=lr).init()["lr"])(-rates)
    assert got.isnan().all()
    meta = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=torch.zeros((), device="meta"))
    assert meta.init()["lr"].is_meta


@pytest.mark.parametrize(
    ("transform", "values"),
    [
        ("linear", [math.inf, math.nan]),
        ("log", [0.0, -1.0, math.nan, math.inf]),
        ("log1m", [1.0, 2.0, math.nan, -math.inf]),
        ("logit", [0.0, 1.0, -1.0, math.nan]),
    ],
)
def test_a_tensor_outside_of_the_domain_is_named(transform, values):
    for x in values:
        for wrap in (torch.tensor, lambda x: torch.nn.Parameter(torch.tensor([0.5, x]))):
            with pytest.raises(ValueError, match=f"'lr' holds {x:g}, which is not .*{transform}"):
                fmeta.learn(optimizers.sgd, {"lr": transform}, lr=wrap(x))
