"""Compiled passes give what the rules give without them."""

import math

import pytest
import torch

from fmeta import optimizers
from fmeta._leafwise import consuming_update
from fmeta.optimizers import _fused, _normalized_mlp

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

    for module in (_adafactor_mlp_fused, _normalized_mlp_fused):
        monkeypatch.setattr(module, "recorded", lambda fn, *_, **__: plain(fn))
    return called


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_passes_give_what_the_rule_gives(name, shape, passes):
    params, hidden = trained(name, shape, compile=True)
    # Its two largest axes are neither those of a kernel nor those before them.
    assert bool(passes) == ("normalized" not in name or shape != (64, 3, 7, 7))
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
    most = _normalized_mlp._COMPILED if "normalized" in name else _fused.FUSED_NUMEL
    side = math.isqrt(most) - 1
    trained(name, (side, side), compile=True)
    assert not passes


@pytest.mark.parametrize(("size", "layers", "fused"), [(32, 1, 1), (32, 2, 0), (64, 1, 0)])
def test_wide_networks_are_not_written_out(size, layers, fused, passes):
    rule = optimizers.adafactor_mlp(hidden_size=size, hidden_layers=layers, compile=True)
    params = {"w": torch.ones(128, 128)}
    rule.step(rule.init(), params, params, rule.init_hidden(rule.init(), params))
    assert len(passes) == fused


STACKS = [(24, 40), (40, 24), (24, 40, 3, 3), (40, 24, 3, 3), (200, 300), (96, 64, 3, 3)]


@pytest.mark.parametrize("shape", STACKS, ids=str)
def test_stacks_go_in_one_call(shape, passes):
    generator = torch.Generator().manual_seed(0)
    params = {str(i): torch.randn(shape, generator=generator).double() for i in range(3)}
    found = []
    for compile in (True, False):
        rule = optimizers.normalized_mlp(lr=0.5, compile=compile)
        th = rule.init(torch.Generator().manual_seed(1))
        update, moved = consuming_update(rule), params
        hidden = rule.init_hidden(th, params)
        for _ in range(3):
            delta, hidden = update(th, moved, {k: x.square() for k, x in moved.items()}, hidden)
            moved = {k: x + delta[k] for k, x in moved.items()}
        found.append((moved, hidden))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    calls = 2 if len(shape) == 4 else 1
    assert len(passes) == 3 * calls


def test_state_lies_as_the_loops_go_over_it_and_survives_other_memory(passes):
    rule = optimizers.normalized_mlp(compile=True)
    th, params = rule.init(), {"w": torch.randn(24, 40, 3, 3)}
    hidden = rule.init_hidden(th, params)
    assert hidden.leaves["w"]["m0"].stride(1) == 1
    _, want = rule.step(th, params, params, hidden)
    packed = {k: x.contiguous() for k, x in hidden.leaves["w"].items()}
    kept = {k: x.clone() for k, x in packed.items()}
    _, found = rule.step(th, params, params, hidden._replace(leaves={"w": packed}))
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    torch.testing.assert_close(packed, kept, rtol=0, atol=0)  # a plain step changes no input


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("name", ["normalized_mlp", "adafactor_mlp"])
def test_compiled_passes_give_what_the_rule_gives(name, shape):
    params, _ = trained(name, shape, torch.float32, compile=True)
    want, _ = trained(name, shape, torch.float32)
    torch.testing.assert_close(params["w"], want["w"], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normalized_mlp", "adafactor_mlp"])
def test_compiled_passes_take_float64(name):
    params, hidden = trained(name, (40, 300), torch.float64, compile=True)
    want, wanted_hidden = trained(name, (40, 300), torch.float64)
    torch.testing.assert_close(params, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(hidden, wanted_hidden, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normalized_mlp", "adafactor_mlp"])
def test_other_sizes_and_numbers_compile_nothing_again(name):
    trained(name, (200, 80), torch.float32, compile=True)
    before = _fused.recorded.cache_info().misses
    for shape in [(300, 90), (90, 300), (128, 128)]:
        trained(name, shape, torch.float32, compile=True)
    more = {"lr": 0.25, "weight_decay": 0.5} if name == "normalized_mlp" else {"step_mult": 0.5}
    rule = getattr(optimizers, name)(**more, compile=True)
    params, grads = {"w": torch.ones(201, 81)}, {"w": torch.ones(201, 81)}
    rule.step(rule.init(), params, grads, rule.init_hidden(rule.init(), params))
    assert _fused.recorded.cache_info().misses == before > 0
