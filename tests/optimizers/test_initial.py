"""Initial weights: a normal distribution that is cut, drawn without a look at a value."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fmeta.optimizers._initial import truncated_normal
from fmeta.random import fold_in
from fmeta.torch_optim import LearnedOptimizer

CUT = ["mlp", "adafactor_mlp", "velo", "rnn_mlp", "nn_adam"]


def below(x):
    """The distribution function of a standard normal number that lies within +- 2."""
    phi = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (-2, x, 2)]
    return (phi[1] - phi[0]) / (phi[2] - phi[0])


@pytest.mark.parametrize("shape", [(25, 4000), (100_000,), (4, 25, 1000)], ids=str)
def test_it_is_a_normal_distribution_cut_at_two_deviations(shape):
    inputs = shape[0] if len(shape) < 3 else shape[1]
    w = truncated_normal(shape, fold_in(0))
    assert w.shape == shape
    assert w.dtype == torch.float32
    x = (w.double() * math.sqrt(inputs)).reshape(-1)
    assert x.abs().max() <= 2 + 1e-6
    assert x.abs().max() > 1.999
    # phi(2) / P(|x| < 2) gives the moments of what is left.
    density = math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    second, fourth = 1 - 4 * density, 3 - 12 * density - 16 * density
    n = len(x)
    assert abs(x.mean()) < 4 * math.sqrt(second / n)
    assert abs(x.square().mean() - second) < 4 * math.sqrt((fourth - second**2) / n)
    assert abs(x.pow(4).mean() - fourth) < 4 * math.sqrt(16 * fourth / n)
    expected = torch.tensor([below(v) for v in x.sort().values.tolist()], dtype=torch.float64)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (expected - steps).abs().max() < 1.63 / math.sqrt(n)  # Kolmogorov and Smirnov, 1 %


def test_the_generator_decides():
    a, b, c = (truncated_normal((3, 5), fold_in(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("rule", CUT)
def test_weights_are_drawn_as_fake_tensors(rule):
    with FakeTensorMode(allow_non_fake_inputs=True):
        p = torch.nn.Parameter(torch.ones(4, 3))
        opt = LearnedOptimizer([p], rule, num_steps=5)
        p.grad = torch.ones_like(p)
        opt.step(loss=torch.ones(()))
        assert opt.state
