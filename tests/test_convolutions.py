"""Convolutions and pooling of few-shot networks are torch's own, in every derivative."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmeta._convolutions import conv2d, fast_convolutions, max_pool2d
from fmeta.fewshot import conv4

GEOMETRIES = {
    "padded": {"padding": 1},
    "bare": {},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": 2, "padding": (2,)},
}
WINDOWS = {
    "2": (2,),
    "(3, 2)": ((3, 2),),
    "overlapping": (3, 1, 1),
    "rest": (2, 2, 0, 1, True),
    "dilated": (2, 1, 0, 2),
}


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def three_derivatives(fn, *inputs):
    """The value, and gradients of random sums of it, of the gradients and of theirs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    found = [fn(*inputs)]
    told = list(found)
    for order in range(3):
        total = sum((x * draw(*x.shape, seed=order + i)).sum() for i, x in enumerate(found))
        found = torch.autograd.grad(
            (total.square() if order == 0 else total),
            inputs,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        told += found
    return told


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_convolution_has_the_derivatives_of_torchs(geometry, channels):
    inputs = draw(2, channels, 7, 6), draw(4, channels, 3, 2, seed=1), draw(4, seed=2)
    ours = three_derivatives(lambda x, w, b: conv2d(x, w, b, **geometry), *inputs)
    torchs = three_derivatives(lambda x, w, b: F.conv2d(x, w, b, **geometry), *inputs)
    assert len(ours) == 10
    torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_pooling_has_the_derivatives_of_torchs(window, channels):
    x = draw(2, channels, 7, 8)
    ours = three_derivatives(lambda x: max_pool2d(x, *window).sin(), x)
    torchs = three_derivatives(lambda x: F.max_pool2d(x, *window).sin(), x)
    torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-9)


def test_finite_differences_of_the_second_derivative():
    x, w = draw(2, 2, 5, 5).requires_grad_(), draw(3, 2, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, w: max_pool2d(conv2d(x, w, padding=1).tanh(), 2), (x, w)
    )


def test_equal_numbers_share_their_gradient_as_in_torch():
    """The first of the largest gets it: ties are usual after a relu."""
    x = torch.zeros(1, 3, 4, 4, dtype=torch.float64).requires_grad_()
    ours, torchs = (torch.autograd.grad(f(x, 2).sum(), x)[0] for f in (max_pool2d, F.max_pool2d))
    assert torch.equal(ours, torchs)


def layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding="same", groups=2),
            nn.MaxPool2d(2, stride=1),
        ).double()


def graph_of(y):
    """Names of all operations that made y."""
    names, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        names.add(type(node).__name__)
        left += [n for n, _ in node.next_functions if n is not None]
    return names


def test_layers_are_replaced_within_the_context_alone():
    net, x = layers(), draw(3, 1, 8, 8)
    with fast_convolutions():
        ours = net(x)
    torchs = net(x)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    assert {"_ConvolutionBackward", "_PoolingBackward"} <= graph_of(ours)
    assert "ConvolutionBackward0" in graph_of(ours)  # of the groups, which stay torch's
    assert not any(name.startswith("_") for name in graph_of(torchs))


def test_transforms_get_torchs_own():
    net, x = layers(), draw(3, 2, 1, 8, 8)

    def loss(x):
        with fast_convolutions():
            return net(x).square().sum()

    seen = torch.func.vmap(torch.func.grad(loss))(x)
    tangent = torch.func.jvp(loss, (x[0],), (x[1],))[1]
    torch.testing.assert_close(tangent, (seen[0] * x[1]).sum())


def test_a_graph_is_walked_under_vmap_too():
    """As `is_grads_batched` does, of the second derivative as well."""
    x, w = draw(2, 2, 6, 6), draw(3, 2, 3, 3, seed=1)

    def rows(conv, pool):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = pool(conv(a, b, padding=1).tanh(), 2)
        first = torch.autograd.grad(y.square().sum(), (a, b), create_graph=True)
        each = draw(5, *first[1].shape, seed=3)
        return torch.autograd.grad(first[1], (a, b), each, is_grads_batched=True)

    torch.testing.assert_close(rows(conv2d, max_pool2d), rows(F.conv2d, F.max_pool2d))


@pytest.mark.parametrize("kind", ["autocast", "empty", "mixed dtypes"])
def test_other_inputs_go_to_torch(kind):
    x, w = torch.randn(2, 1, 4, 4), torch.randn(3, 1, 3, 3)
    if kind == "empty":
        assert conv2d(x[:0], w).shape == (0, 3, 2, 2)
    elif kind == "mixed dtypes":
        with pytest.raises(RuntimeError, match="should be the same"):
            conv2d(x, w.double())
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert conv2d(x, w).dtype is torch.bfloat16


def test_wrong_strides_are_torchs_to_tell():
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="stride should not be zero"):
        max_pool2d(x, 2, 0)
    assert max_pool2d(x, 2, []).shape == (1, 1, 2, 2)


def test_conv4_pools_before_the_relu_and_gives_the_same():
    model = conv4(5, side=16)
    params = {k: v.double() for k, v in model.init(torch.Generator().manual_seed(0)).items()}
    x = draw(6, 16, 16)
    h = x.unsqueeze(1)
    for i in range(4):
        h = F.conv2d(h, params[f"conv{i}.w"], params[f"conv{i}.b"], padding=1)
        h = F.batch_norm(h, None, None, params[f"norm{i}.w"], params[f"norm{i}.b"], training=True)
        h = F.max_pool2d(F.relu(h), 2)
    expected = h.flatten(1) @ params["head.w"] + params["head.b"]
    torch.testing.assert_close(model.apply(params, x)[0], expected)
