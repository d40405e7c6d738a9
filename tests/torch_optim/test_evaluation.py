"""Parameters to evaluate with are swapped in for a while, and training goes on untouched."""

import pytest
import torch

import fmeta
from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer


def averaging(rate=0.5):
    """Gradient descent with a running average of the parameters, in which it is evaluated."""

    def start(th, params, *, num_steps=None):
        return fmeta.Hidden([{"average": p.clone()} for p in params], {})

    def update(th, params, grads, hidden, *, loss=None, extras=None):
        delta = [None if g is None else -0.1 * g for g in grads]
        leaves = [
            h if d is None else {"average": torch.lerp(h["average"], p + d, rate)}
            for p, d, h in zip(params, delta, hidden.leaves, strict=True)
        ]
        return delta, fmeta.Hidden(leaves, {})

    def shown(th, params, hidden):
        return [
            p if p is None else h["average"] for p, h in zip(params, hidden.leaves, strict=True)
        ]

    return fmeta.Optimizer(lambda generator=None: {}, start, update, eval_params=shown)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def test_swapped_in_and_back_bit_for_bit(kit):
    model = kit.net()
    model[0].bias.requires_grad_(False)
    opt = LearnedOptimizer(model.parameters(), averaging())
    with opt.eval_params():
        pass  # before the first step there is nothing to swap
    kit.train(model, opt, 0, 3)
    before = values(model)
    with opt.eval_params():
        for i, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
            if i == 1:
                assert torch.equal(p, old)
            else:
                assert torch.equal(p, opt.state[p]["average"])
                assert not torch.equal(p, old)
    assert all(map(torch.equal, values(model), before))
    assert all(p.requires_grad == (i != 1) for i, p in enumerate(model.parameters()))


def test_back_after_an_error_and_when_nested(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), averaging())
    kit.train(model, opt, 0, 3)
    before = values(model)

    def evaluate():
        with opt.eval_params():
            with opt.eval_params():
                inner = values(model)
            assert all(map(torch.equal, values(model), inner))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert all(map(torch.equal, values(model), before))


def test_no_step_and_no_loading_in_between(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), averaging())
    kit.train(model, opt, 0, 2)
    opt.eval()
    opt.eval()
    for call in (opt.step, lambda: opt.load_state_dict(opt.state_dict())):
        with pytest.raises(RuntimeError, match=r"call opt.train\(\) first"):
            call()
    opt.train()
    opt.train()
    kit.train(model, opt, 2, 3)


def test_training_goes_on_as_without(kit):
    model, other = kit.net(), kit.net()
    opt = LearnedOptimizer(model.parameters(), averaging())
    kit.train(model, opt, 0, 2)
    with opt.eval_params():
        kit.loss_of(model, 0)
    kit.train(model, opt, 2, 4)
    kit.train(other, LearnedOptimizer(other.parameters(), averaging()), 0, 4)
    assert kit.same(model, other)


def test_most_rules_show_the_parameters_themselves(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), optimizers.adam())
    kit.train(model, opt, 0, 1)
    before = values(model)
    with opt.eval_params():
        assert all(map(torch.equal, values(model), before))
