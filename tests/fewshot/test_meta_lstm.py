"""The LSTM meta-learner's meta-gradient against a loop in plain autograd."""

import pytest
import torch
from torch.nn import functional as F

from fmeta import fewshot, optimizers, trees
from fmeta.random import fold_in

from . import kit


def by_hand(net, rule, meta_params, episodes, steps, constant):
    """The paper's algorithm, task after task; ``constant``: gradients and losses the rule reads."""
    leaves = {k: v.clone().requires_grad_() for k, v in meta_params["model_params"].items()}
    weights = {k: v.clone().requires_grad_() for k, v in meta_params["opt_params"].items()}
    total = 0
    for i in range(len(episodes.support.x)):
        task, params = kit.one(episodes, i), dict(leaves)
        hidden = rule.init_hidden(weights, params, num_steps=steps)
        for _ in range(steps):
            out = torch.func.functional_call(net, params, task.support.x)
            loss = F.mse_loss(out, task.support.y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            grads = dict(zip(params, grads, strict=True))
            if constant:
                loss, grads = loss.detach(), {k: g.detach() for k, g in grads.items()}
            delta, hidden = rule.update(weights, params, grads, hidden, loss=loss)
            params = {k: v + delta[k] for k, v in params.items()}
        out = torch.func.functional_call(net, params, task.query.x)
        total = total + F.mse_loss(out, task.query.y) / len(episodes.support.x)
    found = torch.autograd.grad(total, [*leaves.values(), *weights.values()])
    return {
        "model_params": dict(zip(leaves, found[: len(leaves)], strict=True)),
        "opt_params": dict(zip(weights, found[len(leaves) :], strict=True)),
    }


@pytest.mark.parametrize("first_order", [True, False])
def test_the_meta_gradient_is_that_of_the_paper(first_order):
    """Gates that forget much, so that the path through the cell state counts."""
    net, episodes, steps = kit.regression_net(), kit.waves(2), 3
    sizes = {"hidden_size": 3, "forget_bias": 1.0, "input_bias": -1.0}
    learner = fewshot.meta_lstm(net, num_steps=steps, loss="mse", first_order=first_order, **sizes)
    meta_params = trees.map(torch.Tensor.double, learner.init(fold_in(2)))
    rule = optimizers.meta_lstm(3, forget_bias=1.0, input_bias=-1.0)
    want = by_hand(net, rule, meta_params, episodes, steps, constant=first_order)
    found = learner.estimate(meta_params, episodes).grads
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-11)


def test_by_default_it_is_of_first_order():
    episodes = kit.points(2)[1]
    default, paper, exact = (
        fewshot.meta_lstm(kit.classifier(), num_steps=2, hidden_size=3, **options)
        for options in ({}, {"first_order": True}, {"first_order": False})
    )
    meta_params = default.init()
    got, same, other = (x.estimate(meta_params, episodes).grads for x in (default, paper, exact))
    assert all(map(torch.equal, trees.leaves(got), trees.leaves(same)))
    assert not torch.allclose(got["opt_params"]["gates.bias"], other["opt_params"]["gates.bias"])
