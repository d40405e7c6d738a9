"""Options as users and libraries give them: numbers of NumPy, names that mean nothing, dtypes."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer


def moved(kit, steps=3, **options):
    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), "adam", **options)
    kit.train(model, opt, 0, steps)
    return model, opt


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64], ids=lambda k: k.__name__)
def test_numbers_of_numpy_are_numbers(kind, kit):
    plain, _ = moved(kit, lr=0.5, weight_decay=0.25, num_steps=7)
    model, opt = moved(kit, lr=kind(0.5), weight_decay=kind(0.25), num_steps=np.int64(7))
    assert kit.same(model, plain)
    group = kit.through_file(opt.state_dict())["param_groups"][0]  # NumPy's are refused there
    assert (group["lr"], group["weight_decay"], group["num_steps"]) == (0.5, 0.25, 7)
    groups = [{"params": kit.net().parameters(), "lr": kind(0.5), "num_steps": np.int32(7)}]
    group = LearnedOptimizer(groups, "adam", num_steps=7).param_groups[0]
    assert (type(group["lr"]), type(group["num_steps"])) == (float, int)


def test_whole_numbers_of_numpy_and_those_set_later(kit):
    plain, _ = moved(kit, lr=2)
    model, _ = moved(kit, lr=np.int64(2))
    assert kit.same(model, plain)
    for m, lr in ((plain, 0.5), (model, np.float32(0.5))):
        again = LearnedOptimizer(m.parameters(), "sgd")
        again.param_groups[0]["lr"] = lr
        kit.train(m, again, 0, 1)
    assert kit.same(model, plain)


@pytest.mark.parametrize("loss", [np.float32(1.5), np.float64(1.5), np.int64(2)], ids=repr)
def test_a_loss_of_numpy(loss, kit):
    models = [kit.net(), kit.net()]
    for model, value in zip(models, (loss, float(loss)), strict=True):
        opt = LearnedOptimizer(model.parameters(), "velo", num_steps=3)
        kit.loss_of(model, 0).backward()
        opt.step(loss=value)
    assert kit.same(*models)


@pytest.mark.parametrize("lr", [np.float32(-1), np.float32("nan"), np.bool_(True), np.complex64(1)])
def test_numbers_that_are_no_rates_are_refused(lr):
    with pytest.raises(ValueError, match="Invalid learning rate"):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], "adam", lr=lr)


# -- names ---------------------------------------------------------------------------------------

MEANT = {
    "nonfinite": ("skip", r"'nonfinite' .*LearnedOptimizer\(\.\.\., nonfinite=\.\.\.\)"),
    "compile": (True, r"'compile' .*LearnedOptimizer\(\.\.\., compile=\.\.\.\)"),
    "name_or_optimizer": ("sgd", "'name_or_optimizer' .*one for all groups"),
    "opt_params": ({}, "'opt_params' .*one for all groups"),
    "learning_rate": (0.1, "'learning_rate' .*did you mean 'lr'"),
    "LR": (0.1, "'LR' .*did you mean 'lr'"),
    "weight_decy": (0.1, "'weight_decy' .*did you mean 'weight_decay'"),
    "maximise": (True, "'maximise' .*did you mean 'maximize'"),
}


@pytest.mark.parametrize("key", MEANT)
def test_an_option_that_has_no_effect_is_told(key):
    value, message = MEANT[key]
    w, v = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.warns(UserWarning, match=message):
        opt = LearnedOptimizer([{"params": [w], key: value}], "adam")
    with pytest.warns(UserWarning, match=message):
        opt.add_param_group({"params": [v], key: value})


LIBRARIES = (
    "initial_lr max_lr min_lr base_lr base_momentum max_momentum swa_lr lr_scale lr_mult name step "
    "group_name layer betas momentum eps initial_weight_decay is_expert_parallel rank"
)


def test_names_of_schedulers_and_libraries_are_theirs(kit):
    names = LIBRARIES.split()
    model = kit.net()
    group = {"params": list(model.named_parameters()), **dict.fromkeys(names, 0.1), 3: "three"}
    opt = LearnedOptimizer([group], "adam")
    last = dict(opt.param_groups[0], params=[("v", nn.Parameter(torch.ones(2)))])
    del last["param_names"]
    opt.add_param_group(last)
    torch.optim.lr_scheduler.OneCycleLR(opt, 1.0, total_steps=5, cycle_momentum=False)
    other = LearnedOptimizer([group], "adam")
    other.load_state_dict(LearnedOptimizer([group], "adam").state_dict())


def test_what_repeats_the_constructor_is_no_mistake():
    w = nn.Parameter(torch.ones(2))
    rule = optimizers.adam()
    whole = {"name_or_optimizer": rule, "nonfinite": "skip", "compile": False, "opt_params": None}
    opt = LearnedOptimizer([{"params": [w], **whole}], **whole)
    assert opt.skipped_steps == 0


def test_defaults_are_arguments_of_the_constructor(kit):
    model, opt = moved(kit, lr=0.5, weight_decay=0.1, num_steps=5)
    again = type(opt)(model.parameters(), "adam", **opt.defaults)
    assert again.defaults == opt.defaults
    assert again.param_groups == opt.param_groups
    again.load_state_dict(opt.state_dict())
    again.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert again.param_groups[1]["rule"] == "adam"
    assert again.param_groups[1]["weights_hash"] == opt.param_groups[0]["weights_hash"]


# -- horizons ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "saved", "told"), [(9, 5, True), (5, 5, False), (None, 5, False), (5, None, False)]
)
def test_a_horizon_that_a_saved_state_overrules_is_told(built, saved, told, kit):
    _, opt = moved(kit, num_steps=saved)
    again = LearnedOptimizer(kit.net().parameters(), "adam", num_steps=built)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        again.load_state_dict(opt.state_dict())
    assert [str(w.message) for w in found] == [
        "this state is of a training of num_steps=5, which is taken, and not the num_steps=9 that "
        "the optimizer was built with: give it the same"
    ] * told
    assert again.param_groups[0]["num_steps"] == saved


# -- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["adam", "normalized_mlp", "lstm", "velo", "basis_mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_another_dtype_after_a_step_is_named_with_its_cure(rule, dtype, kit):
    other = torch.float64 if dtype is torch.float32 else torch.float32
    model = kit.net(dtype=dtype)
    opt = LearnedOptimizer(model.named_parameters(), rule, num_steps=9)
    kit.train(model, opt, 0, 2)
    model.to(other)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(TypeError, match=r"parameter 0\.weight is .*load_state_dict"):
            kit.train(model, opt, 2, 3)
        assert all(map(torch.equal, before, model.parameters()))
    opt.load_state_dict(opt.state_dict())  # the cure
    kit.train(model, opt, 2, 4)
    assert not any(map(torch.equal, before, model.parameters()))
    assert {x.dtype for x in opt.state[model[0].weight].values()} <= {other, torch.int64}


def test_half_precision_and_back_needs_no_cure(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.named_parameters(), "adam")
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32)):
        kit.train(model.to(dtype), opt, i, i + 1)
    assert opt.state[model[0].weight]["count"] == 3


def test_another_dtype_before_the_first_step(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.named_parameters(), "adam")
    kit.train(model.double(), opt, 0, 3)
    same = kit.net(dtype=torch.float64)
    kit.train(same, LearnedOptimizer(same.named_parameters(), "adam"), 0, 3)
    assert kit.same(model, same)


# -- parameters that are no real numbers -----------------------------------------------------------


@pytest.mark.parametrize("rule", ["adam", "basis_mlp"])
def test_frozen_complex_parameters_are_not_seen_by_the_rule(rule, kit):
    model, plain = kit.net(), kit.net()
    phase = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    opt = LearnedOptimizer([*model.named_parameters(), ("phase", phase)], rule, num_steps=9)
    same = LearnedOptimizer(plain.named_parameters(), rule, num_steps=9)
    kit.train(model, opt, 0, 2)
    kit.train(plain, same, 0, 2)
    assert kit.same(model, plain)
    assert torch.equal(phase, torch.ones(2))
    assert phase not in opt.state
    opt.load_state_dict(kit.through_file(opt.state_dict()))
    phase.requires_grad_().grad = torch.ones_like(phase)
    with pytest.raises(TypeError, match=r"parameter phase is complex.*view_as_real"):
        opt.step()
