"""Meta-gradients of MAML and its kin against independent programs, float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fmeta import fewshot
from fmeta.random import fold_in

from . import kit

DATA = np.load(Path(__file__).parents[1] / "reference" / "meta_gradient.npz")
NAMES = ("w1", "b1", "w2", "b2")


def array(key):
    return torch.from_numpy(np.asarray(DATA[key]))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Parameter(array(f"p0/{name}")))

    def forward(self, x):
        return torch.tanh(x @ self.w1 + self.b1) @ self.w2 + self.b2


def episode():
    x, y = array("x_train").flatten(0, 1), array("y_train").flatten().long()
    query = fewshot.Examples(array("x_val")[None], array("y_val").long()[None])
    return fewshot.Episode(fewshot.Examples(x[None], y[None]), query)


@pytest.mark.parametrize("checkpoint", [None, "sqrt"])
@pytest.mark.parametrize("order", ["second", "first"])
def test_meta_sgd_equals_the_reference(order, checkpoint):
    """Ten steps, each on a batch of its own, with a rate for every parameter."""
    learner = fewshot.meta_sgd(
        Net(), num_steps=10, batch_size=16, first_order=order == "first", checkpoint=checkpoint
    )
    meta_params = learner.init()
    meta_params["opt_params"] = {"lr": {n: array(f"lr_sgd/{n}") for n in NAMES}}
    found = learner.estimate(meta_params, episode())
    torch.testing.assert_close(found.loss, array("sgd/val_loss"), rtol=1e-10, atol=0)
    for part, key in (("model_params", "grad_p0"), ("opt_params", "grad_lr")):
        grads = found.grads[part] if part == "model_params" else found.grads[part]["lr"]
        for n in NAMES:
            want = array(f"sgd/val/{order}/{key}/{n}")
            scale = want.abs().max().item()
            torch.testing.assert_close(grads[n], want, rtol=0, atol=1e-8 * scale)


def test_imaml_equals_the_reference():
    """Logistic regression, whose inner training is carried to its optimum."""
    case = "imaml_logistic"
    x, y, xv, yv = (array(f"{case}/{k}")[None] for k in ("x_train", "y_train", "x_val", "y_val"))
    net = nn.Linear(6, 1, bias=False).double()
    net.weight.data = array(f"{case}/theta")[None]
    learner = fewshot.imaml(
        net,
        lr=0.4,
        num_steps=60,
        proximal=float(array(f"{case}/lam")),
        num_iterations=10,
        loss=lambda outputs, y: F.binary_cross_entropy_with_logits(outputs[:, 0], y),
    )
    episodes = fewshot.Episode(fewshot.Examples(x, y.double()), fewshot.Examples(xv, yv.double()))
    found = learner.estimate(learner.init(), episodes)
    torch.testing.assert_close(found.loss, array(f"{case}/val_loss"), rtol=1e-8, atol=0)
    got = found.grads["model_params"]["weight"][0]
    torch.testing.assert_close(got, array(f"{case}/meta_grad"), rtol=0, atol=1e-8)
    adapted = learner.adapt(learner.init(), fewshot.Examples(x[0], y[0].double()))
    phi = adapted.params["weight"][0]
    torch.testing.assert_close(phi, array(f"{case}/phi_star"), rtol=0, atol=1e-9)


def by_hand(net, episodes, lr, steps, first_order):
    """MAML by plain autograd, task after task."""
    params = dict(net.named_parameters())
    total = 0
    for i in range(len(episodes.support.x)):
        task = kit.one(episodes, i)
        fast = dict(params)
        for _ in range(steps):
            out = torch.func.functional_call(net, fast, task.support.x)
            grads = torch.autograd.grad(
                F.mse_loss(out, task.support.y), list(fast.values()), create_graph=not first_order
            )
            fast = {k: v - lr * g for (k, v), g in zip(fast.items(), grads, strict=True)}
        out = torch.func.functional_call(net, fast, task.query.x)
        total = total + F.mse_loss(out, task.query.y)
    total = total / len(episodes.support.x)
    return total.detach(), torch.autograd.grad(total, list(params.values()))


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_equals_plain_autograd(first_order):
    net, episodes = kit.regression_net(), kit.waves()
    builder = fewshot.first_order_maml if first_order else fewshot.maml
    learner = builder(net, lr=0.05, num_steps=4, loss="mse")
    found = learner.estimate(learner.init(), episodes)
    loss, grads = by_hand(net, episodes, 0.05, 4, first_order)
    torch.testing.assert_close(found.loss, loss, rtol=1e-10, atol=0)
    for got, want in zip(found.grads["model_params"].values(), grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_equals_higher(first_order):
    higher = pytest.importorskip("higher")
    net, episodes = kit.regression_net(), kit.waves()
    learner = fewshot.maml(net, lr=0.05, num_steps=3, loss="mse", first_order=first_order)
    found = learner.estimate(learner.init(), episodes).grads["model_params"]
    net.zero_grad()
    inner = torch.optim.SGD(net.parameters(), lr=0.05)
    for i in range(4):
        task = kit.one(episodes, i)
        with higher.innerloop_ctx(
            net, inner, copy_initial_weights=False, track_higher_grads=not first_order
        ) as (fnet, diffopt):
            for _ in range(3):
                diffopt.step(F.mse_loss(fnet(task.support.x), task.support.y))
            value = F.mse_loss(fnet(task.query.x), task.query.y) / 4
            if first_order:  # its recipe: gradients at the end, taken as those at the start
                grads = torch.autograd.grad(value, list(fnet.parameters()))
                for p, g in zip(net.parameters(), grads, strict=True):
                    p.grad = g if p.grad is None else p.grad + g
            else:
                value.backward()
    for p, got in zip(net.parameters(), found.values(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-8, atol=1e-12)


def test_maml_equals_torchopt():
    torchopt = pytest.importorskip("torchopt")
    net, episodes = kit.regression_net(), kit.waves()
    learner = fewshot.maml(net, lr=0.05, num_steps=3, loss="mse")
    found = learner.estimate(learner.init(), episodes).grads["model_params"]
    inner = torchopt.MetaSGD(net, lr=0.05)
    start, rule = torchopt.extract_state_dict(net), torchopt.extract_state_dict(inner)
    params = list(net.parameters())
    total = 0
    for i in range(4):
        task = kit.one(episodes, i)
        for _ in range(3):
            inner.step(F.mse_loss(net(task.support.x), task.support.y))
        total = total + F.mse_loss(net(task.query.x), task.query.y) / 4
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(inner, rule)
    for got, want in zip(found.values(), torch.autograd.grad(total, params), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_equals_learn2learn(first_order):
    l2l = pytest.importorskip("learn2learn")
    net, episodes = kit.regression_net(), kit.waves()
    learner = fewshot.maml(net, lr=0.05, num_steps=3, loss="mse", first_order=first_order)
    found = learner.estimate(learner.init(), episodes).grads["model_params"]
    outer = l2l.algorithms.MAML(net, lr=0.05, first_order=first_order)
    total = 0
    for i in range(4):
        task, clone = kit.one(episodes, i), outer.clone()
        for _ in range(3):
            clone.adapt(F.mse_loss(clone(task.support.x), task.support.y))
        total = total + F.mse_loss(clone(task.query.x), task.query.y) / 4
    grads = torch.autograd.grad(total, list(net.parameters()))
    for got, want in zip(found.values(), grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


def test_rates_of_first_order_maml_still_learn():
    import fmeta

    rule = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.05)
    episodes = kit.waves()
    grads = {}
    for order in (False, "gradients", "inputs"):
        learner = fewshot.maml(
            kit.regression_net(), optimizer=rule, num_steps=2, loss="mse", first_order=order
        )
        grads[order] = learner.estimate(learner.init(), episodes).grads["opt_params"]["lr"]
    assert grads["gradients"].abs() > 1e-4
    assert (grads["gradients"] - grads[False]).abs() > 1e-8


def test_with_one_step_reptile_is_joint_training():
    net, episodes = kit.regression_net(), kit.waves()
    learner = fewshot.reptile(net, lr=0.03, num_steps=1, loss="mse")
    found = learner.estimate(learner.init(), episodes).grads["model_params"]
    x = torch.cat([episodes.support.x, episodes.query.x], 1)
    y = torch.cat([episodes.support.y, episodes.query.y], 1)
    joint = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    for got, want in zip(found.values(), joint, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_anil_worked_out_once_equals_anil_by_steps():
    """`conv4` tells which part makes the features; a rule for names alone does not."""
    images = torch.rand(4, 6, 8, 8, generator=fold_in(1))
    source = fewshot.from_classes({"train": images}, ways=3, shots=1, queries=2)
    episodes = fewshot.draw(source, [(0, 0), (0, 1)])
    model = fewshot.conv4(3, side=8, channels=4, blocks=2)
    fast, slow = fewshot.anil(model), fewshot.anil(model._replace(embed=None, head=None))
    start = fast.init()
    a, b = fast.estimate(start, episodes), slow.estimate(start, episodes)
    torch.testing.assert_close(a.grads, b.grads, rtol=1e-4, atol=1e-6)


def test_weights_of_steps_fall_to_the_last_one():
    episodes = kit.waves()
    many = fewshot.maml_plus_plus(kit.regression_net(), lr=0.05, num_steps=3, loss="mse")
    plain = fewshot.maml(kit.regression_net(), lr=0.05, num_steps=3, loss="mse")
    start = many.init()
    late = many.estimate(start, episodes, 0.5)
    want = plain.estimate(plain.init(), episodes)
    torch.testing.assert_close(late.loss, want.loss)
    torch.testing.assert_close(late.grads["model_params"], want.grads["model_params"])
    early = many.estimate(start, episodes, 0.0)
    each = []
    for steps in (1, 2, 3):
        learner = fewshot.maml(kit.regression_net(), lr=0.05, num_steps=steps, loss="mse")
        each.append(learner.estimate(learner.init(), episodes).loss)
    torch.testing.assert_close(early.loss, sum(each) / 3)
    rates = late.grads["opt_params"]["lr"]["0.weight"]
    assert rates.shape == (3,)
    assert (rates.abs() > 1e-9).all()
