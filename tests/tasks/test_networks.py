"""The networks of digits: equal to torch's own, exact second derivatives, able to learn."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

import fmeta
from fmeta.tasks import digits, loss_of_task, sample_task, stack_tasks
from fmeta.tasks._networks import cross_entropy, uniform

MODELS = {
    "mlp": {"widths": (6,)},
    "cnn": {"widths": (3, 4), "activation": "tanh"},
    "autoencoder": {"widths": (6, 3), "activation": "tanh"},
    "transformer": {"widths": (8, 8), "activation": "gelu"},
}


def drawn(model, index=0, **options):
    family = digits(**{**MODELS[model], "batch_size": 8, **options}, model=model)
    return family, sample_task(family, 1, 0, index)


def loss_at(family, task, params):
    return family.loss(family.data, task.config, params, task.batches[0])


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("widths", [(5,), (5, 4), ()])
def test_mlp(widths, activation):
    family, task = drawn("mlp", widths=widths, activation=activation)
    p, batch = task.model_params, task.batches[0]
    x, last = family.data["x"][batch], len(widths)
    for i in range(last + 1):
        x = x @ p[f"w{i}"] + p[f"b{i}"]
        x = x if i == last else getattr(F, activation)(x)
    want = -x.log_softmax(-1)[range(8), family.data["y"][batch]].mean()
    torch.testing.assert_close(loss_at(family, task, p), want)


@pytest.mark.parametrize("widths", [(3,), (3, 4), (2, 3, 4, 5)])
def test_cnn_is_that_of_torch(widths):
    family, task = drawn("cnn", widths=widths)
    p, batch = task.model_params, task.batches[0]
    x = family.data["x"][batch].view(8, 1, 8, 8)
    for i in range(len(widths)):
        x = F.conv2d(x, p[f"conv{i}.w"], p[f"conv{i}.b"], stride=2, padding=1).tanh()
    logits = x.permute(0, 2, 3, 1).flatten(1) @ p["head.w"] + p["head.b"]
    want = F.cross_entropy(logits, family.data["y"][batch])
    torch.testing.assert_close(loss_at(family, task, p), want)


@pytest.mark.parametrize(("width", "heads"), [(8, 4), (6, 2)])
def test_transformer_is_that_of_torch(width, heads):
    family, task = drawn("transformer", widths=(width,) * 2)
    gain = lambda k, p: 1.5 * p if k.endswith((".gain", ".b", ".shift")) else p
    p = {k: gain(k, x) for k, x in task.model_params.items()}
    with torch.random.fork_rng():
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
    names = {
        "self_attn.in_proj_": "qkv",
        "self_attn.out_proj.": "out",
        "linear1.": "up",
        "linear2.": "down",
    }
    x = family.data["x"][task.batches[0]].view(8, 8, 8) @ p["embed.w"] + p["embed.b"]
    x = x + p["position"]
    for i in range(2):
        state = {}
        for theirs, ours in names.items():
            state[f"{theirs}weight"] = p[f"block{i}.{ours}.w"].T
            state[f"{theirs}bias"] = p[f"block{i}.{ours}.b"]
        for norm in ("norm1", "norm2"):
            state[f"{norm}.weight"] = p[f"block{i}.{norm}.gain"]
            state[f"{norm}.bias"] = p[f"block{i}.{norm}.shift"]
        x = torch.func.functional_call(layer, state, (x,), strict=True)
    x = F.layer_norm(x, (width,), p["norm.gain"], p["norm.shift"]).mean(1)
    want = F.cross_entropy(x @ p["head.w"] + p["head.b"], family.data["y"][task.batches[0]])
    torch.testing.assert_close(loss_at(family, task, p), want)


def test_cross_entropy_is_that_of_torch_with_every_derivative():
    logits = 30 * torch.randn(5, 4, generator=fmeta.random.fold_in(0), dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2])
    for f in (lambda g: g, grad, lambda g: grad(lambda x: grad(g)(x).sin().sum())):
        got, want = (
            f(lambda x, h=h: h(x, labels))(logits) for h in (cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("online", [False, True])
def test_loss_and_gradient_under_vmap_equal_one_by_one(model, online):
    tasks = [drawn(model, i, online=online)[1] for i in range(3)]
    family = drawn(model, online=online)[0]
    both = stack_tasks(tasks)
    loss = lambda p, b: family.loss(family.data, {}, p, b)
    got = vmap(grad(loss))(both.model_params, both.batches[:, 0])
    for i, task in enumerate(tasks):
        want = grad(loss)(task.model_params, task.batches[0])
        for k in want:
            torch.testing.assert_close(got[k][i], want[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_second_derivatives_equal_finite_differences(model):
    family, task = drawn(model, activation="tanh", online=True)
    params = fmeta.trees.cast(task.model_params, torch.float64)
    g = fmeta.random.fold_in(3)
    along = {k: torch.randn(x.shape, generator=g, dtype=x.dtype) for k, x in params.items()}
    slope = grad(lambda p: loss_at(family, task, p))

    def directional(p):
        found = slope(p)
        return torch.stack([(found[k] * along[k]).sum() for k in found]).sum()

    at = lambda eps: directional({k: x + eps * along[k] for k, x in params.items()})
    want = (at(1e-5) - at(-1e-5)) / 2e-5
    curvature = grad(directional)(params)
    got = torch.stack([(curvature[k] * along[k]).sum() for k in along]).sum()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns(model):
    family = digits((8, 8), batch_size=32, model=model, online=True)
    task = sample_task(family, 120, 0)
    losses = fmeta.unroll(
        fmeta.optimizers.adam(0.02), loss_of_task(family), {}, task.model_params, task.batches,
        loss_args=(task.config,),
    ).losses  # fmt: skip
    assert losses[-20:].mean() < 0.75 * losses[0]


def test_initial_weights_have_the_variance_of_their_inputs():
    g = fmeta.random.fold_in(0)
    w = uniform(g, 200, 50, fan_in=200)
    assert w.shape == (200, 50)
    assert abs(float(w.mean())) < 4 * (200**-0.5) / 100
    assert float(w.var()) == pytest.approx(1 / 200, rel=0.05)
    assert float(w.abs().max()) <= (3 / 200) ** 0.5
