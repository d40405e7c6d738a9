"""Second derivatives of normalisation layers are right under vmap too, where torch's are wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jacrev, vmap

import fmeta
from fmeta._norms import norms_written_out

LAYERS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, bare": lambda: nn.BatchNorm2d(4, affine=False),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layer": lambda: nn.LayerNorm([4, 5, 5]),
    "group": lambda: nn.GroupNorm(2, 4),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(layer, batch_norm="batch", **options):
    """Meta-loss of two tasks after an inner step: one by one, and under vmap."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), layer(), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)
        ).double()
    if batch_norm is None:
        net.eval()
    apply, params, buffers = fmeta.functionalize(net, batch_norm=batch_norm)
    support, query = draw(2, 2, 6, 4, 5, 5), draw(2, 6, 4, 5, 5, seed=1)
    labels = torch.arange(6) % 3

    def loss_fn(params, x):
        return F.cross_entropy(apply(params, buffers, x), labels)

    def of_task(params, support, query):
        run = fmeta.unroll(fmeta.optimizers.sgd(0.5), loss_fn, {}, params, support, **options)
        return loss_fn(run.params, query)

    def one_by_one(params):
        return (of_task(params, support[0], query[0]) + of_task(params, support[1], query[1])) / 2

    def together(params):
        return vmap(of_task, in_dims=(None, 0, 0))(params, support, query).mean()

    return params, one_by_one, together


@pytest.mark.parametrize("options", [{}, {"checkpoint": "sqrt"}, {"mixed_mode": True}], ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_derivatives_outside_of_vmap_equal_those_of_a_loop(layer, options):
    if layer is LAYERS["group"] and options.get("mixed_mode"):
        pytest.skip("torch's group normalisation has no forward derivative of its backward pass")
    params, one_by_one, together = problem(layer, **options)
    torch.testing.assert_close(
        grad(together)(params), grad(one_by_one)(params), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("layer", ["batch", "layer"])
def test_they_equal_finite_differences(layer):
    params, one_by_one, together = problem(LAYERS[layer])
    way = {k: draw(*p.shape, seed=3) for k, p in params.items()}
    up, down = (one_by_one({k: p + e * way[k] for k, p in params.items()}) for e in (1e-5, -1e-5))
    found = sum((g * way[k]).sum() for k, g in grad(together)(params).items())
    torch.testing.assert_close(found, (up - down) / 2e-5, rtol=1e-6, atol=0)


def test_running_statistics_are_left_to_torch():
    params, one_by_one, together = problem(LAYERS["batch"], batch_norm=None)
    torch.testing.assert_close(grad(together)(params), grad(one_by_one)(params))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_are_those_of_torch(dtype):
    x, w, b = draw(3, 6, 4, 5).to(dtype), draw(4, seed=1).to(dtype), draw(4, seed=2).to(dtype)
    w5, b5 = draw(5, seed=1).to(dtype), draw(5, seed=2).to(dtype)

    def layers(x):
        return (
            F.layer_norm(x, (5,), w5, b5, 1e-3),
            F.layer_norm(x, (4, 5)),
            F.batch_norm(x, None, None, w, b, training=True, eps=1e-3),
            F.instance_norm(x, weight=w, bias=b),
            F.instance_norm(x),
        )

    def written_out(x):
        with norms_written_out():
            return layers(x)

    together = vmap(written_out)(x)
    for i in range(3):
        for found, expected in zip(together, layers(x[i]), strict=True):
            assert found.dtype == dtype
            rounding = 4 * torch.finfo(dtype).eps  # torch rounds some results in between
            torch.testing.assert_close(found[i], expected, rtol=rounding, atol=rounding)


def test_wrong_use_is_told_by_torch_itself():
    def wrong_shape(x):
        with norms_written_out():
            return F.layer_norm(x, (3,))

    with pytest.raises(RuntimeError, match="normalized_shape"):
        vmap(wrong_shape)(draw(2, 4, 5))

    def one_value(x):
        with norms_written_out():
            return F.batch_norm(x, None, None, training=True)

    with pytest.raises(ValueError, match="more than 1 value per channel"):
        vmap(one_value)(draw(2, 1, 5))


@pytest.mark.parametrize("layer", ["layer", "batch"])
def test_derivatives_of_jacobians_need_no_vmap_to_be_wrong(layer):
    """`jacrev` has one of its own."""
    x, w = draw(6, 5), draw(5, seed=1)

    def fused(x, w):
        if layer == "layer":
            return torch.tanh(F.layer_norm(x, (5,), w))
        return torch.tanh(F.batch_norm(x, None, None, w, training=True))

    def by_hand(x, w):
        var, mean = torch.var_mean(x, -1 if layer == "layer" else 0, correction=0, keepdim=True)
        return torch.tanh((x - mean) / (var + 1e-5).sqrt() * w)

    def slope(fn):
        both = jacrev(fn, argnums=(0, 1))
        return grad(lambda x: sum(j.square().sum() for j in both(x, w)))(x)

    want = slope(by_hand)
    with norms_written_out():
        assert not torch.allclose(slope(fused), want, rtol=1e-2)  # else this file can go
    with norms_written_out(always=True):
        torch.testing.assert_close(slope(fused), want, rtol=1e-11, atol=1e-13)
