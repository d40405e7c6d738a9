"""Compiled passes give what the rules give without them."""

import math

import pytest
import torch

from fmeta import optimizers
from fmeta.optimizers import _fused

SHAPES = [(200, 80), (40, 300), (64, 32, 3, 3), (16, 64, 3, 3), (128, 96, 1, 1), (64, 3, 7, 7)]
RULES = {
    "normalized_mlp": {"lr": 0.5, "weight_decay": 0.1},
    "normalized_mlp, orthogonalized": {"lr": 0.5, "orthogonalize": True},
    "adafactor_mlp": {"exp_mult": 0.1, "step_mult": 0.1},
    "adafactor_mlp, other sizes": {
        "hidden_size": 8,
        "hidden_layers": 1,
        "initial_momentum_decays": (0.9, 0.95),
        "initial_rms_decays": (0.9, 0.99),
        "initial_adafactor_decays": (0.8, 0.99),
    },
}


def trained(name, shape, dtype=torch.float64, **more):
    """Parameters and state after three steps."""
    rule = getattr(optimizers, name.split(",")[0])(**RULES[name], **more)
    generator = torch.Generator().manual_seed(0)
    th = rule.init(generator)
    params = {"w": torch.randn(shape, generator=generator, dtype=dtype)}
    hidden = rule.init_hidden(th, params)
    for _ in range(3):
        g = torch.randn(shape, generator=generator, dtype=dtype)
        grads = {"w": 3e3 * g**3}  # some beyond the clamp
        params, hidden = rule.step(th, params, grads, hidden)
    return params, hidden


@pytest.fixture
def passes(monkeypatch):
    """The passes run as they are written, in place of minutes of compilation; calls are noted."""
    called = []

    def plain(fn):
        called.append(fn.__name__)
        return fn

    from fmeta.optimizers import _adafactor_mlp_fused, _normalized_mlp_fused

    monkeypatch.setattr(_adafactor_mlp_fused, "compiled", plain)
    monkeypatch.setattr(_normalized_mlp_fused, "recorded", lambda fn, *_: plain(fn))
    return called


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_passes_give_what_the_rule_gives(name, shape, passes):
    params, hidden = trained(name, shape, compile=True)
    assert passes
    want, wanted_hidden = trained(name, shape)
    torch.testing.assert_close(params, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(hidden, wanted_hidden, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_derivatives_take_the_plain_way(name, passes):
    rule = getattr(optimizers, name.split(",")[0])(**RULES[name], compile=True)
    th, params = rule.init(), {"w": torch.ones(128, 128)}
    hidden = rule.init_hidden(th, params)

    def loss(th):
        return rule.step(th, params, params, hidden)[0]["w"].square().sum()

    grads = torch.func.grad(loss)(th)
    assert not passes
    assert all(x.isfinite().all() for x in grads.values())


@pytest.mark.parametrize("name", RULES)
def test_small_tensors_are_not_compiled(name, passes):
    side = math.isqrt(_fused.FUSED_NUMEL) - 1
    trained(name, (side, side), compile=True)
    assert not passes


def test_wide_layers_are_not_written_out(passes):
    rule = optimizers.adafactor_mlp(hidden_size=32, compile=True)
    params = {"w": torch.ones(128, 128)}
    rule.step(rule.init(), params, params, rule.init_hidden(rule.init(), params))
    assert not passes


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("name", ["normalized_mlp", "adafactor_mlp"])
def test_compiled_passes_give_what_the_rule_gives(name, shape):
    params, _ = trained(name, shape, torch.float32, compile=True)
    want, _ = trained(name, shape, torch.float32)
    torch.testing.assert_close(params["w"], want["w"], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_other_sizes_and_numbers_compile_nothing_again():
    from torch._dynamo.utils import counters

    trained("normalized_mlp", (200, 80), torch.float32, compile=True)
    before = counters["stats"]["unique_graphs"]
    for shape in [(300, 90), (90, 300), (128, 128)]:
        trained("normalized_mlp", shape, torch.float32, compile=True)
    rule = optimizers.normalized_mlp(lr=0.25, weight_decay=0.5, compile=True)
    params, grads = {"w": torch.ones(201, 81)}, {"w": torch.ones(201, 81)}
    rule.step(rule.init(), params, grads, rule.init_hidden(rule.init(), params))
    assert counters["stats"]["unique_graphs"] == before
