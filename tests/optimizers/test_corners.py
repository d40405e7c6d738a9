"""Corners of the rules: rounding that references keep, norms of tiny tensors, shared weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad

import fmeta
from fmeta import optimizers
from fmeta.functional import activations, layer_activity
from fmeta.optimizers._trust_ratio import trust_ratio


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.9999])
def test_nn_adam_keeps_its_decays_as_float32_has_them(beta):
    """The reference stores ``log(1 - beta) / 10`` of a beta that was rounded to float32."""
    rule = optimizers.nn_adam(initial_beta2=beta)
    th, params = rule.init(), {"w": draw(3)}
    _, hidden = rule.step(th, params, params, rule.init_hidden(th, params))
    u = np.float32(math.log1p(-beta) / 10)
    rounded = np.float32(1) - np.exp(np.float32(10) * u)
    want = np.log(np.float32(1) - rounded) / np.float32(10)
    torch.testing.assert_close(hidden.leaves["w"]["beta2"], torch.tensor(want), rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("size", [1e-3, 1e-12, 1e-15, 1e-17])
def test_the_trust_ratio_of_tiny_updates_has_its_derivative(size):
    p, u = 2 * torch.ones(3), size * torch.tensor([1.0, 2.0, 2.0])
    ratio = lambda x: trust_ratio(p, x, 0).sum()
    wide = lambda x: (p.double().norm() / x.norm()).sum()
    torch.testing.assert_close(ratio(u).double(), wide(u.double()))
    torch.testing.assert_close(grad(ratio)(u).double(), grad(wide)(u.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-13, 1e-6])
def test_gradients_of_any_size_keep_derivatives_finite(name, size):
    rule = getattr(optimizers, name)()
    p = {"w": torch.ones(2, 3)}

    def after(g):
        q, h = p, rule.init_hidden({}, p)
        for _ in range(2):
            q, h = rule.step({}, q, {"w": g}, h)
        return q["w"].square().sum()

    assert grad(after)(size * torch.ones(2, 3)).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 4), (4, 3, 2), (3, 4, 2), (4, 2, 3)])
def test_adafactor_factors_any_two_axes(shape):
    """One step beside the formula: the mean of rows is over d1, wherever that is."""
    g, p = (draw(*shape, seed=s).double() for s in (1, 2))
    rule = optimizers.adafactor(0.1, min_dim_size_to_factor=2, clipping_threshold=None)
    got, _ = rule.update({}, {"w": p}, {"w": g}, rule.init_hidden({}, {"w": p}))
    d1, d0 = sorted(range(3), key=lambda i: shape[i])[-2:]
    square = g.numpy() ** 2 + 1e-30
    row, col = square.mean(d0, keepdims=True), square.mean(d1, keepdims=True)
    u = g.numpy() / np.sqrt(row * col / row.mean(d1, keepdims=True))
    want = -0.1 * max(np.sqrt((p.numpy() ** 2).mean()), 1e-3) * u
    torch.testing.assert_close(got["w"], torch.from_numpy(want))


@pytest.mark.parametrize(
    "change",
    [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)],
    ids=["relu", "hardtanh"],
)
def test_activity_is_as_it_was_before_it_changed_in_place(change):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), change, nn.Linear(8, 2))
    params, x = dict(net.named_parameters()), draw(16, 4)
    seen = activations(net, ("0", "1"))(params, {}, x)
    torch.testing.assert_close(seen["0"][1], net[0](x))
    torch.testing.assert_close(seen["1"][0], net[0](x))
    assert seen["0"][1].min() < 0 <= seen["1"][1].min() + 1


def test_a_submodule_that_is_called_twice_has_no_one_activity():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(self.a(x))

    net = Twice()
    with pytest.raises(ValueError, match="'a' was called more than once"):
        activations(net, ("a",))(dict(net.named_parameters()), {}, torch.ones(2, 3))


def test_a_weight_that_layers_share_is_refused_by_path():
    rule = optimizers.hebbian_mlp()
    p = {"w": draw(3, 3)}
    layer = layer_activity(draw(5, 3), draw(5, 3, seed=1), "w")
    th, hidden = rule.init(), rule.init_hidden(rule.init(), p)
    zeros = {"w": torch.zeros(3, 3)}
    rule.step(th, p, zeros, hidden, extras={"activations": [layer]})
    with pytest.raises(ValueError, match="path 'w' is in several layers"):
        rule.step(th, p, zeros, hidden, extras={"activations": [layer, layer]})


def test_a_look_at_a_validation_loss_keeps_nan_gradients_out_of_derivatives():
    rule = optimizers.rnn_mlp()
    th, p = rule.init(), {"w": draw(2, 2)}
    hidden, bad = rule.init_hidden(th, p), {"w": torch.full((2, 2), math.nan)}

    def after(p):
        more = {"loss": torch.tensor(1.0), "extras": {"is_valid": torch.tensor(True)}}
        return rule.step(th, p, bad, hidden, **more)[0]["w"].sum()

    assert torch.equal(grad(after)(p)["w"], torch.ones(2, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optimizers.nn_adam(initial_learning_rate=1e6), "initial_learning_rate must be fr"),
        (lambda: optimizers.nn_adam(initial_beta2=0.9999999), "1 - initial_beta2 must be from"),
        (lambda: optimizers.nn_adam(initial_epsilon=1e-30), "initial_epsilon must be from"),
        (lambda: optimizers.rnn_mlp(chunk_size=True), "chunk_size must be an integer"),
        (lambda: optimizers.rnn_mlp(chunk_size=1.5), "chunk_size must be an integer"),
        (lambda: optimizers.rnn_mlp(decays=(0.99999999,)), "is 1 in float32"),
        (lambda: optimizers.hebbian_mlp(lr=torch.ones(3)), "lr must be a scalar"),
    ],
)
def test_what_cannot_be_meant_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["adagrad", "yogi"])
def test_a_start_of_squares_is_one_number(name):
    with pytest.raises(TypeError, match="initial_accumulator_value"):
        getattr(optimizers, name)(initial_accumulator_value={"w": torch.ones(())})


# -- loaders -----------------------------------------------------------------------------------


def meta_mlp():
    layers = {"input": nn.Linear(39, 4), "linear_0": nn.Linear(4, 4), "output": nn.Linear(4, 2)}
    return nn.ModuleDict({"network": nn.ModuleDict(layers)}).state_dict()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_what_is_no_weight_is_refused_by_name(dtype):
    arrays = {**meta_mlp(), "network.output.bias": torch.zeros(2, dtype=dtype)}
    with pytest.raises(ValueError, match=r"network\.output\.bias .* weights are floating"):
        fmeta.pretrained.from_pylo("adafactor_mlp", arrays)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    arrays = {**meta_mlp(), "network.output.bias": torch.full((2,), value, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"network\.output\.bias .* not finite"):
        fmeta.pretrained.from_pylo("adafactor_mlp", arrays)
    theta = {k: x.numpy() for k, x in optimizers.mlp().init().items()}
    theta["b0"] = np.full(32, value)
    with pytest.raises(ValueError, match=r"b0 .* not finite"):
        fmeta.pretrained.from_google("mlp", theta)


def test_a_meta_mlp_gets_the_numbers_that_pylo_uses_with_it(tmp_path):
    path = tmp_path / "network.pt"
    torch.save(meta_mlp(), path)
    rule, th = fmeta.pretrained.load(path)
    assert th["momentum_decays"].tolist() == pytest.approx([0.15216392, 0.14245212, 0.06812963])
    assert th["rms_decays"].tolist() == pytest.approx([0.01079706])
    assert th["adafactor_decays"].tolist() == pytest.approx([0.18621896, -0.10864615, -0.06185547])
    own = optimizers.adafactor_mlp(step_mult=0.01)
    p = {"w": draw(5, 4)}
    steps = [r.update(th, p, p, r.init_hidden(th, p))[0]["w"] for r in (rule, own)]
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("path", [[], None, 3, ()])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(TypeError, match="give a path"):
        fmeta.pretrained.load(path)


def test_files_are_saved_under_a_name_that_says_what_they_are(tmp_path):
    th = optimizers.linear().init()
    with pytest.raises(ValueError, match=r"name it \*\.safetensors"):
        fmeta.pretrained.save(tmp_path / "x.pt", "linear", th)
    whole = {"weight": torch.ones(1, 2, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"path weight are torch\.int32"):
        fmeta.pretrained.save(tmp_path / "x.safetensors", "linear", whole)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arrays", [[1], {"network.input.weight": [1.0]}])
def test_what_is_no_state_dict_is_refused(arrays):
    with pytest.raises((TypeError, ValueError), match=r"state dict|not a tensor"):
        fmeta.pretrained.from_pylo("adafactor_mlp", arrays)
