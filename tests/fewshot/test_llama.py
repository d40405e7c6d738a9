"""LLAMA's meta-gradient of networks that normalise, where torch's own layers mislead `jacrev`."""

import pytest
import torch
from torch import nn

from fmeta import fewshot, trees
from fmeta.fewshot._llama import curvature_log_det
from fmeta.fewshot._model import as_model

from . import kit


class Written(nn.Module):
    """Normalisation in sums and products, over the dimension ``dim`` of ``(n, 5)``."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.weight, self.bias = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        apart = x - x.mean(self.dim, keepdim=True)
        scale = (apart.square().mean(self.dim, keepdim=True) + 1e-5).sqrt()
        return apart / scale * self.weight + self.bias


LAYERS = {
    "layer": (nn.LayerNorm(5), Written(-1)),
    "batch": (nn.BatchNorm1d(5), Written(0)),
}


def net(layer):
    return kit.seeded(nn.Sequential(nn.Linear(4, 5), layer, nn.Tanh(), nn.Linear(5, 3)).double())


@pytest.mark.parametrize("name", LAYERS)
def test_the_meta_gradient_is_that_of_normalisation_by_hand_and_of_differences(name):
    _, episodes = kit.points(3)
    fused, written = (
        fewshot.llama(net(layer), eta=1.0, num_steps=2, loss="cross_entropy")
        for layer in LAYERS[name]
    )
    meta_params = fused.init()
    found = fused.estimate(meta_params, episodes)
    want = written.estimate(meta_params, episodes)
    torch.testing.assert_close(found.loss, want.loss)
    torch.testing.assert_close(found.grads, want.grads, rtol=1e-10, atol=1e-12)

    e = 1e-6
    up, down = (
        fused.estimate(trees.map(lambda x, s=s: x + s, meta_params), episodes).loss for s in (e, -e)
    )
    slope = sum(g.sum() for g in trees.leaves(found.grads))
    torch.testing.assert_close(slope, (up - down) / (2 * e), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_the_curvature_of_one_task_can_be_differentiated_without_a_vmap(name):
    _, episodes = kit.points(1)
    support = kit.one(episodes, 0).support

    def gradient(layer):
        model = as_model(net(layer))
        params = {k: v.requires_grad_() for k, v in model.init(None).items()}
        adapted = fewshot.Adapted(params, (), torch.zeros(0))
        value = curvature_log_det(model, adapted, support, lambda name: True, 0.5, True)
        return torch.autograd.grad(value, list(params.values()))

    fused, written = map(gradient, LAYERS[name])
    torch.testing.assert_close(fused, written, rtol=1e-10, atol=1e-12)
