"""Steps on devices without values: meta, and fake CUDA tensors."""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer

KNOWN = {"loss", "num_steps"}
OF_A_TREE = {  # builders that take the parameter tree first
    n
    for n, b in optimizers.BUILDERS.items()
    if any(p.default is p.empty for p in inspect.signature(b).parameters.values())
}
SCALED = {"lr": 0.5, "weight_decay": 0.1}
OPTIONS = {"schedule_free_adamw": {}}  # refuses them
RULES = [n for n, b in optimizers.BUILDERS.items() if n in OF_A_TREE or b().needs <= KNOWN]


def step_on_meta(model, opt):
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    opt.step(loss=torch.empty((), device="meta"))


@pytest.mark.parametrize("nonfinite", ["allow", "skip", "raise"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_on_meta_has_the_state_of_a_step(rule, nonfinite, kit):
    model = kit.net()
    options = OPTIONS.get(rule, SCALED)
    real = LearnedOptimizer(model.parameters(), rule, num_steps=9, nonfinite=nonfinite, **options)
    kit.train(model, real, 0, 2)
    shadow = kit.net().to("meta")
    opt = LearnedOptimizer(shadow.parameters(), rule, num_steps=9, nonfinite=nonfinite, **options)
    for _ in range(2):
        step_on_meta(shadow, opt)
    assert opt.state.keys() == set(shadow.parameters()) or not real.state
    for p, q in zip(model.parameters(), shadow.parameters(), strict=True):
        want, got = real.state.get(p, {}), opt.state.get(q, {})
        assert want.keys() == got.keys()
        for k, x in want.items():
            assert got[k].device.type == "meta", k
            assert (got[k].shape, got[k].dtype) == (x.shape, x.dtype), k


def test_weights_follow_parameters_that_are_replaced_in_their_groups(kit):
    """As some libraries do when they move or shard a model."""
    model, shadow = kit.net(), kit.net().to("meta")
    opt = LearnedOptimizer(model.named_parameters(), "lstm")
    opt.param_groups[0]["params"] = list(shadow.parameters())
    step_on_meta(shadow, opt)
    assert {x.device.type for s in opt.state.values() for x in s.values()} == {"meta"}


@pytest.mark.parametrize("rule", ["normalized_mlp", optimizers.normalized_mlp()], ids=type)
def test_a_rule_found_where_models_have_no_values_has_its_weights(rule):
    want = LearnedOptimizer([torch.nn.Parameter(torch.ones(2))], rule).param_groups[0]
    with torch.device("meta"):
        shadow = torch.nn.Parameter(torch.ones(2))
        opt = LearnedOptimizer([shadow], rule)
    assert opt.param_groups[0]["weights_hash"] == want["weights_hash"]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("nonfinite", ["allow", "skip"])
@pytest.mark.parametrize("rule", [n for n in RULES if n not in OF_A_TREE])
def test_no_value_is_looked_at_and_no_device_mixed_on_fake_cuda(rule, nonfinite, capturable):
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [
            torch.nn.Parameter(torch.ones(4, 3, device="cuda")),
            torch.nn.Parameter(torch.ones(3, device="cuda", dtype=torch.bfloat16)),
        ]
        opt = LearnedOptimizer(
            params, rule, num_steps=5, nonfinite=nonfinite, capturable=capturable,
            **OPTIONS.get(rule, SCALED),
        )  # fmt: skip
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step(loss=torch.ones((), device="cuda"))
        assert {x.device.type for s in opt.state.values() for x in s.values()} <= {"cuda"}
