"""What a step does: torch's semantics, each option, and clear errors."""

import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fmeta
from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer


def param(*values, **options):
    return nn.Parameter(torch.tensor(values, **options))


def reads(names, seen):
    """A rule that notes what it is given under these names, and moves by the loss."""

    def update(th, params, grads, hidden, *, loss=None, extras=None):
        seen.append((loss, extras))
        factor = loss if "loss" in names else extras[names[0]]
        return [-factor * g for g in grads], hidden

    return fmeta.Optimizer(
        lambda generator=None: {},
        lambda th, params, *, num_steps=None: fmeta.Hidden([{} for _ in params], {}),
        update,
        frozenset(names),
    )


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    w = param(2.0)
    opt = LearnedOptimizer([w], optimizers.sgd(0.25))

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
        assert not torch.is_grad_enabled()
    assert loss.item() == 4
    assert w.item() == 1
    assert opt.step() is None
    assert not w.grad_fn
    assert w.requires_grad


@pytest.mark.parametrize("how", ["closure", "keyword", "number", "one element"])
def test_every_way_to_give_the_loss(how):
    w, seen = param(1.0), []
    opt = LearnedOptimizer([w], reads(["loss"], seen))
    w.grad = torch.tensor([1.0])
    loss = (w * 0.5).sum()
    if how == "closure":
        opt.step(lambda: loss)
    else:
        opt.step(loss={"keyword": loss, "number": 0.5, "one element": loss.reshape(1, 1)}[how])
    assert w.item() == 0.5
    (given, _) = seen[0]
    assert given.shape == ()
    assert not given.requires_grad


def test_other_inputs_go_by_name():
    w, seen = param(1.0), []
    opt = LearnedOptimizer([w], reads(["noise"], seen))
    w.grad = torch.tensor([1.0])
    opt.step(extras={"noise": torch.tensor(0.25)})
    assert w.item() == 0.75
    with pytest.raises(ValueError, match=r"needs noise: call opt.step\(extras={'noise': ...}\)"):
        opt.step()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda opt: opt.step(), ValueError, r"step\(loss=loss\).*step\(closure\)"),
        (lambda opt: opt.step(lambda: None), ValueError, "needs the loss"),
        (lambda opt: opt.step(torch.ones(())), TypeError, r"closure, got a Tensor.*loss=loss"),
        (lambda opt: opt.step(loss=torch.ones(3)), ValueError, r"scalar.*\(3,\)"),
        (lambda opt: opt.step(loss="0.5"), TypeError, "'0.5'"),
    ],
    ids=["none", "closure without", "as closure", "vector", "text"],
)
def test_a_loss_that_is_missing_or_none(call, error, message):
    w = param(1.0)
    opt = LearnedOptimizer([w], reads(["loss"], []))
    w.grad = torch.tensor([1.0])
    with pytest.raises(error, match=message):
        call(opt)
    assert w.item() == 1


def test_frozen_parameters_and_those_without_gradient_stay_as_they_are():
    w, frozen, unused = param(1.0), param(1.0), param(1.0)
    frozen.requires_grad_(False)
    opt = LearnedOptimizer([w, frozen, unused], "adam", weight_decay=0.5)
    w.square().sum().backward()
    opt.step()
    assert w.item() != 1
    assert frozen.item() == unused.item() == 1
    assert list(opt.state) == [w]


def test_a_step_without_any_gradient_is_none():
    w = param(1.0)
    opt = LearnedOptimizer([w], "basis_mlp", num_steps=5)
    opt.step()
    assert w.item() == 1
    assert not opt.state


def test_sparse_gradients_are_refused_by_name():
    table = nn.Embedding(5, 2, sparse=True)
    opt = LearnedOptimizer(table.named_parameters(), "adam")
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"parameter weight is sparse.*sparse=False"):
        opt.step()


def test_parameters_on_two_devices_are_refused():
    a, b = param(1.0), nn.Parameter(torch.ones(1, device="meta"))
    opt = LearnedOptimizer([a, b], "sgd")
    a.grad, b.grad = torch.ones(1), torch.ones(1, device="meta")
    with pytest.raises(ValueError, match="parameter 0 is on cpu, parameter 1 on meta"):
        opt.step()


def test_a_delta_of_another_shape_is_refused():
    def update(th, params, grads, hidden, *, loss=None, extras=None):
        return [torch.ones(()) for _ in params], hidden

    rule = reads([], [])._replace(update=update)
    w = param(1.0, 2.0)
    opt = LearnedOptimizer([w], rule)
    w.grad = torch.ones(2)
    with pytest.raises(ValueError, match="delta at path 0"):
        opt.step()
    assert w.tolist() == [1, 2]


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rate_and_decay_of_each_group(dtype, tensor):
    a, b = param(1.0, -2.0, dtype=dtype), param(3.0, 0.5, dtype=dtype)
    half = torch.tensor(0.5) if tensor else 0.5
    groups = [{"params": [a], "lr": half}, {"params": [b], "weight_decay": 0.125}]
    opt = LearnedOptimizer(groups, optimizers.sgd(0.25), lr=2.0)
    a.grad, b.grad = torch.tensor([1.0, 4.0], dtype=dtype), torch.tensor([-2.0, 8.0], dtype=dtype)
    opt.step()
    assert a.tolist() == [1 - 0.5 * 0.25, -2 - 0.5]
    assert b.tolist() == [3 + 1 - 0.25 * 3, 0.5 - 4 - 0.25 * 0.5]


def test_decay_is_not_for_what_the_rule_leaves_alone():
    a, b = param(1.0), param(1.0)
    rule = fmeta.masked(optimizers.sgd(0.5), lambda path, p: path == "a")
    opt = LearnedOptimizer([("a", a), ("b", b)], rule, weight_decay=0.5)
    a.grad = b.grad = torch.ones(1)
    opt.step()
    assert (a.item(), b.item()) == (0.0, 1.0)


@pytest.mark.parametrize("rule", ["sgd", "adam", "normalized_mlp"])
def test_maximize_is_descent_on_the_negative(rule):
    def trained(maximize):
        w = param(1.0, 2.0, 3.0)
        groups = [{"params": [w], "maximize": maximize}]
        opt = LearnedOptimizer(groups, rule)
        for _ in range(3):
            opt.zero_grad()
            loss = w.square().sum()
            (loss if maximize else -loss).backward()
            grad = w.grad.clone()
            opt.step()
            assert torch.equal(w.grad, grad)
        return w

    assert torch.equal(trained(True), trained(False))


def test_master_weights_catch_small_steps_of_bfloat16():
    def trained(rule):
        w = param(1.0, dtype=torch.bfloat16)
        opt = LearnedOptimizer([w], rule)
        for _ in range(8):
            w.grad = torch.ones_like(w)
            opt.step()
        return w.item()

    assert trained(optimizers.sgd(1e-3)) == 1
    assert trained(fmeta.master_weights(optimizers.sgd(1e-3))) == pytest.approx(0.992, abs=4e-3)


def test_hooks_of_step():
    w, calls = param(1.0), []
    opt = LearnedOptimizer([w], optimizers.sgd(0.01))
    w.grad = torch.ones(1)
    pre = opt.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre"))
    post = opt.register_step_post_hook(lambda o, args, kwargs: calls.append(w.item()))
    everywhere = register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("all"))
    opt.step()
    pre.remove()
    post.remove()
    everywhere.remove()
    opt.step()
    assert calls == ["pre", pytest.approx(0.99), "all"]


def test_a_pre_hook_may_give_the_loss():
    w, seen = param(1.0), []
    opt = LearnedOptimizer([w], reads(["loss"], seen))
    opt.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "loss": 0.5}))
    w.grad = torch.ones(1)
    opt.step()
    assert seen[0][0].item() == 0.5


def test_a_group_that_is_added_in_the_middle(kit):
    model = kit.net()
    names = list(model.named_parameters())
    opt = LearnedOptimizer(names[:2], "basis_mlp", num_steps=20)
    kit.train(model, opt, 0, 2)
    opt.add_param_group({"params": names[2:], "lr": 0.5})
    before = [p.detach().clone() for _, p in names]
    kit.train(model, opt, 2, 3)
    assert all(not torch.equal(p, q) for (_, p), q in zip(names, before, strict=True))
    assert [opt.state[p]["count"].item() for _, p in names] == [3, 3, 1, 1]
    assert opt.state[names[3][1]]["shared/t"].item() == 3
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": names[:1]})
    with pytest.raises(TypeError, match="complex"):
        opt.add_param_group({"params": [("c", param(1j))]})
    assert len(opt.param_groups) == 2
    kit.train(model, opt, 3, 4)


def test_zero_grad():
    w = param(1.0)
    opt = LearnedOptimizer([w], "sgd")
    w.grad = torch.ones(1)
    opt.zero_grad(set_to_none=False)
    assert w.grad.tolist() == [0]
    opt.zero_grad()
    assert w.grad is None


def test_capturable_keeps_the_memory_of_the_state(kit):
    model, plain = kit.net(), kit.net()
    opt = LearnedOptimizer(model.parameters(), "velo", num_steps=9, capturable=True)
    other = LearnedOptimizer(plain.parameters(), "velo", num_steps=9)
    kit.train(model, opt, 0, 1)
    kit.train(plain, other, 0, 1)
    held = [(x, x.data_ptr()) for s in opt.state.values() for x in s.values()]
    assert len({at for _, at in held}) == len({id(x) for x, _ in held})
    kit.train(model, opt, 1, 4)
    kit.train(plain, other, 1, 4)
    now = [(x, x.data_ptr()) for s in opt.state.values() for x in s.values()]
    assert all(x is y and a == b for (x, a), (y, b) in zip(held, now, strict=True))
    assert kit.same(model, plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert all(torch.equal(x, other.state[q][k]) for k, x in opt.state[p].items())


def test_capturable_may_be_switched_on_later(kit):
    model, plain = kit.net(), kit.net()
    opt = LearnedOptimizer(model.parameters(), "lstm")
    other = LearnedOptimizer(plain.parameters(), "lstm")
    kit.train(model, opt, 0, 2)  # states are views of one buffer now
    opt.param_groups[0]["capturable"] = True
    kit.train(model, opt, 2, 4)
    kit.train(plain, other, 0, 4)
    assert kit.same(model, plain)


def test_learning_goes_on(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), optimizers.adam(0.02))
    losses = kit.train(model, opt, 0, 60)
    assert losses[-1] < 0.3 * losses[0]
    assert math.isfinite(losses[-1])
