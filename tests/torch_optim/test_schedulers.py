"""Every scheduler of torch drives ``group["lr"]``, which multiplies the rule's update."""

import pytest
import torch
from torch.optim import lr_scheduler as S

from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer

MAKE = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: S.LinearLR(o, 0.25, 1.0, 4),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.25, 1.0, 2), S.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.StepLR(o, 2), S.ExponentialLR(o, 0.9)]),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 5),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 1.0, 10, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.1, 3),
}
PUBLIC = {n for n in S.__all__ if n not in ("LRScheduler",)} | {"SWALR"}


def test_there_is_a_case_for_every_scheduler():
    assert set(MAKE) == PUBLIC


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", sorted(MAKE))
def test_the_update_is_multiplied(name, tensor):
    w, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    lr = torch.tensor(1.0) if tensor else 1.0
    groups = [{"params": [w]}, {"params": [b], "lr": lr * 0.5}]
    opt = LearnedOptimizer(groups, optimizers.sgd(0.5), lr=lr)
    scheduler = MAKE[name](opt)
    seen = set()
    for _ in range(5):
        rates = [float(g["lr"]) for g in opt.param_groups]
        seen.add(rates[0])
        before = [x.detach().clone() for x in (w, b)]
        w.grad, b.grad = torch.ones(2), torch.ones(1)
        opt.step()
        for x, old, rate in zip((w, b), before, rates, strict=True):
            torch.testing.assert_close(
                old - x, torch.full_like(x, 0.5 * rate), rtol=1e-5, atol=1e-7
            )
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(seen) > 1


@pytest.mark.parametrize("make", [S.CyclicLR, S.OneCycleLR])
def test_there_is_no_momentum_to_cycle(make):
    """torch's own message; a rule's momentum is its own business."""
    opt = LearnedOptimizer([torch.nn.Parameter(torch.zeros(2))], "adam")
    arguments = (0.1, 1.0) if make is S.CyclicLR else (1.0, 10)
    with pytest.raises(ValueError, match="momentum"):
        make(opt, *arguments)


def test_optimizer_and_scheduler_are_resumed_together(kit):
    def build(model):
        opt = LearnedOptimizer(model.parameters(), "adam", lr=10.0)
        return opt, S.CosineAnnealingLR(opt, 6)

    whole = kit.net()
    opt, scheduler = build(whole)
    kit.train(whole, opt, 0, 6, scheduler)

    first = kit.net()
    opt, scheduler = build(first)
    kit.train(first, opt, 0, 3, scheduler)
    states = kit.through_file([x.state_dict() for x in (first, opt, scheduler)])
    later = kit.net(seed=3)
    opt, scheduler = build(later)
    for x, state in zip((later, scheduler, opt), (states[0], states[2], states[1]), strict=True):
        x.load_state_dict(state)
    kit.train(later, opt, 3, 6, scheduler)
    assert kit.same(later, whole)
