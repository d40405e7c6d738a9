"""Loss scaling, autocast, low precision, accumulation of gradients."""

import pytest
import torch
from torch import nn

from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer


@pytest.mark.parametrize("rule", ["adam", "normalized_mlp", "basis_mlp"])
def test_a_gradient_scaler_changes_nothing_but_leaves_out_overflows(rule, kit):
    def trained(scale, overflow_at):
        model = kit.net()
        opt = LearnedOptimizer(model.parameters(), rule, num_steps=9)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        for t in range(5):
            opt.zero_grad()
            loss = kit.loss_of(model, t)
            scaler.scale(loss).backward()
            if t == overflow_at:
                if scale == 1:
                    continue
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(opt, loss=loss.detach())
            scaler.update()
        return model

    assert kit.same(trained(2.0**8, None), trained(1, None))
    assert kit.same(trained(2.0**8, 2), trained(1, 2))


def test_clipping_after_unscaling(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), optimizers.sgd(1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    scaler.scale(kit.loss_of(model, 0)).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    scaler.step(opt)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_an_update_within_autocast_keeps_its_precision(kit):
    model, other = kit.net(), kit.net()
    kit.train(model, LearnedOptimizer(model.parameters(), "normalized_mlp"), 0, 1)
    opt = LearnedOptimizer(other.parameters(), "normalized_mlp")
    kit.loss_of(other, 0).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step()
    assert kit.same(model, other)


def test_a_forward_pass_under_autocast(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), optimizers.adam(0.02))
    losses = []
    for t in range(40):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = kit.loss_of(model, t)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("rule", ["adam", "lstm", "normalized_mlp"])
def test_the_state_of_bfloat16_parameters_is_float32(rule, kit):
    model = kit.net(dtype=torch.bfloat16)
    opt = LearnedOptimizer(model.parameters(), rule)
    kit.train(model, opt, 0, 2)
    for p in model.parameters():
        assert p.dtype is torch.bfloat16
        kinds = {x.dtype for x in opt.state[p].values() if x.is_floating_point()}
        assert kinds == {torch.float32}


def test_gradients_that_are_accumulated(kit):
    model, other = kit.net(), kit.net()
    opt = LearnedOptimizer(model.parameters(), "adam")
    for t in range(3):
        x, y = kit.batch(t)
        opt.zero_grad()
        for part in range(4):
            at = slice(2 * part, 2 * part + 2)
            ((model(x[at]) - y[at]).square().mean() / 4).backward()
        opt.step()
    kit.train(other, LearnedOptimizer(other.parameters(), "adam"), 0, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
