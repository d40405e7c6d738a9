"""Sinusoids: the ranges of the paper, and a loss of zero for the wave itself."""

import math

import pytest
import torch

from fmeta.random import fold_in
from fmeta.tasks import sample_task, sinusoid


def test_waves_and_points_fill_their_ranges():
    family = sinusoid(shots=500)
    configs = [family.sample(fold_in(0, i)) for i in range(400)]
    for name, low, high in (("amplitude", 0.1, 5.0), ("phase", 0.0, math.pi)):
        values = torch.stack([c[name] for c in configs])
        assert low <= values.min() < low + 0.1
        assert high - 0.1 < values.max() <= high
    x = family.batches(configs[0], fold_in(1), 4)
    assert x.shape == (4, 500)
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5


def test_the_network_is_the_one_of_the_paper():
    params = sample_task(sinusoid(), 1, 0).model_params
    shapes = {k: tuple(p.shape) for k, p in params.items()}
    assert shapes == {
        "w0": (1, 40), "b0": (40,), "w1": (40, 40), "b1": (40,), "w2": (40, 1), "b2": (1,),
    }  # fmt: skip


def test_the_loss_is_the_squared_distance_to_the_wave():
    family = sinusoid(shots=3, widths=())
    config = {"amplitude": torch.tensor(2.0), "phase": torch.tensor(0.5)}
    params = {"w0": torch.tensor([[0.3]]), "b0": torch.tensor([-1.0])}
    x = [-1.0, 0.25, 4.0]
    want = sum((0.3 * a - 1 - 2 * math.sin(a + 0.5)) ** 2 for a in x) / 3
    assert float(family.loss((), config, params, torch.tensor(x))) == pytest.approx(want)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sinusoid(shots=0), "shots must be at least 1, got 0"),
        (lambda: sinusoid(widths=(40, 0)), r"widths\[1\] must be at least 1, got 0"),
        (lambda: sinusoid(activation="sin"), "unknown activation 'sin'"),
        (lambda: sinusoid().batches({}, fold_in(0), 1, split="dev"), "unknown split 'dev'"),
    ],
)
def test_what_there_is_not_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()
