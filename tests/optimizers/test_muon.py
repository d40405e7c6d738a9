"""Muon: torch's own on matrices, AdamW on the rest, kernels as matrices, errors by name."""

import pytest
import torch

import fmeta
from fmeta import optimizers
from fmeta._newton_schulz import orthogonalize
from fmeta.random import fold_in

DOUBLE = {"dtype": torch.float64}


def normal(*shape, key=0):
    return torch.randn(shape, generator=fold_in(7, key, *shape), **DOUBLE)


def run(rule, start, steps=6):
    noise = {k: normal(steps, *p.shape) for k, p in start.items()}
    return follow(rule, start, noise, steps)


def follow(rule, start, noise, steps=6):
    params, hidden = start, rule.init_hidden({}, start)
    for t in range(steps):
        grads = {k: p + noise[k][t] for k, p in params.items()}
        params, hidden = rule.step({}, params, grads, hidden)
    return params


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7)])
def test_singular_values_become_about_one(shape):
    x = normal(*shape)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    values = torch.diagonal(left.mT @ orthogonalize(x, 10) @ right.mT)
    assert ((values > 0.6) & (values < 1.3)).all()


def test_a_kernel_is_treated_as_the_matrix_of_its_outputs():
    kernel, noise = normal(8, 2, 1, 3), normal(6, 8, 2, 1, 3)
    rule = optimizers.muon(weight_decay=0.1)
    got = follow(rule, {"k": kernel}, {"k": noise})
    want = follow(rule, {"k": kernel.flatten(1)}, {"k": noise.flatten(2)})
    torch.testing.assert_close(got["k"].flatten(1), want["k"])


def test_the_two_layouts_are_transposes_of_each_other():
    tall = normal(6, 2)
    for params, layout, flip in (({"w": tall}, "out_in", False), ({"w": tall.mT}, "in_out", True)):
        rule = optimizers.muon(layout=layout)
        new = rule.step({}, params, params, rule.init_hidden({}, params))[0]["w"]
        moved = ((new.mT if flip else new) - tall).norm()
        # rank 2, each singular value about 1, times lr and sqrt(6 / 2)
        assert moved / (0.02 * 2**0.5 * 3**0.5) == pytest.approx(1.0, abs=0.35)


def test_vectors_without_nesterov_are_given_to_adamw():
    start = {"b": normal(4), "s": normal()}
    options = {"adamw_betas": (0.8, 0.99), "adamw_eps": 1e-6, "adamw_weight_decay": 0.1}
    ours = run(optimizers.muon(0.5, nesterov=False, adamw_lr=0.03, **options), start)
    want = run(optimizers.adamw(0.03, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1), start)
    torch.testing.assert_close(ours, want)


def test_one_rate_is_for_both_parts():
    start = {"b": normal(4), "w": normal(4, 3)}
    one, both = optimizers.muon(0.03), optimizers.muon(0.03, adamw_lr=0.03)
    torch.testing.assert_close(run(one, start), run(both, start), rtol=0, atol=0)


def test_a_batch_of_rates_is_a_loop_over_them():
    start = {"b": normal(4), "w": normal(4, 3)}
    rates = torch.tensor([0.01, 0.1], **DOUBLE)
    noise = {k: normal(6, *p.shape) for k, p in start.items()}
    got = torch.vmap(lambda lr: follow(optimizers.muon(lr), start, noise))(rates)
    for i, lr in enumerate(rates.tolist()):
        want = follow(optimizers.muon(lr), start, noise)
        torch.testing.assert_close({k: v[i] for k, v in got.items()}, want)


def test_its_rate_can_be_learned():
    rule = fmeta.learn(optimizers.muon, {"lr": "log"}, lr=1e-3)

    def meta_loss(th):
        loss = lambda p, b: (p["w"] - 1).square().sum() + (p["b"] - 1).square().sum()
        start = {"w": normal(3, 2), "b": normal(2)}
        return fmeta.unroll(rule, loss, th, start, torch.zeros(5)).losses[-1]

    assert torch.func.grad(meta_loss)(rule.init())["lr"] < 0


def test_a_gradient_of_zero_has_finite_derivatives():
    params = {"w": torch.zeros(3, 2, **DOUBLE)}
    rule = optimizers.muon()

    def moved(g):
        new, _ = rule.step({}, params, {"w": g}, rule.init_hidden({}, params))
        return new["w"].sum()

    assert torch.func.grad(moved)(params["w"]).isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must be not negative"),
        ({"momentum": 1.0}, "momentum must be not negative and below 1"),
        ({"adamw_betas": 0.9}, "adamw_betas must be a pair, got 0.9"),
        ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas\[1\] must be"),
        ({"adamw_lr": -1.0}, "adamw_lr must be not negative"),
        ({"layout": "rows"}, "layout must be one of out_in, in_out, got 'rows'"),
        ({"ns_steps": 0}, "ns_steps must be at least 1, got 0"),
    ],
)
def test_numbers_that_cannot_be_meant_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        optimizers.muon(**options)
