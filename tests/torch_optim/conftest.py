"""A small model, its data, and training loops for the tests of the adapter."""

import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fmeta.random import fold_in


def net(seed=0, dtype=torch.float32):
    """An MLP 4-5-1 with parameters that depend on the seed only."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * torch.randn(p.shape, generator=fold_in(seed, i)))
    return model.to(dtype)


def batch(t, dtype=torch.float32):
    """Inputs and targets of step ``t``."""
    x = torch.randn(8, 4, generator=fold_in(1, t))
    return x.to(dtype), x.sum(-1, keepdim=True).to(dtype)


def loss_of(model, t):
    dtype = next(model.parameters()).dtype
    x, y = batch(t, dtype)
    return (model(x) - y).square().mean()


def train(model, opt, start, stop, scheduler=None, step=None):
    """Steps ``start`` to ``stop``, each given its loss; returns the losses."""
    losses = []
    for t in range(start, stop):
        opt.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        (step or opt.step)(loss=loss.detach())
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def same(model, other):
    """Whether two models have equal parameters, bit for bit."""
    return all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def through_file(value):
    """What ``torch.load`` with ``weights_only`` makes of a saved value."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="session")
def kit():
    """The functions above."""
    return SimpleNamespace(
        net=net, batch=batch, loss_of=loss_of, train=train, same=same, through_file=through_file
    )
