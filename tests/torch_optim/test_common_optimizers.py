"""What torch's own suite asks of every optimizer, asked of these.

Each rule is described as `torch.testing._internal.common_optimizers` describes torch's: arguments,
schedulers, flags. That module's own error inputs, which are for all optimizers, are run too.
"""

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as S

from fmeta import optimizers
from fmeta.random import fold_in
from fmeta.torch_optim import LearnedOptimizer


class Info(NamedTuple):
    """A rule as torch's suite would list it; its step needs no closure, and it takes groups."""

    rule: Any
    inputs: tuple[dict[str, Any], ...]
    schedulers: tuple[Any, ...]
    sizes: tuple[float, float] = (1.0, 0.5)  # rates with which it goes downhill

    def build(self, params, **options):
        return LearnedOptimizer(params, self.rule, **options)


SCHEDULERS = (
    lambda o: S.StepLR(o, gamma=0.9, step_size=10),
    lambda o: S.LinearLR(o, start_factor=0.4, total_iters=4),
    lambda o: S.ReduceLROnPlateau(o),
)
FRIENDLY = (
    {},
    {"lr": 0.5},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"weight_decay": 1e-4, "maximize": True},
    {"capturable": True},
    {"lr": torch.tensor(0.5), "weight_decay": 0.1},
    {"nonfinite": "skip"},
)
INFOS = {
    "adam": Info("adam", FRIENDLY, SCHEDULERS),
    "sgd": Info("sgd", FRIENDLY, SCHEDULERS),
    "sgd with momentum": Info(optimizers.sgd(1e-3, momentum=0.9), FRIENDLY, SCHEDULERS),
    "normalized_mlp": Info("normalized_mlp", FRIENDLY, SCHEDULERS),
    "lstm": Info("lstm", FRIENDLY, SCHEDULERS),
}
STATELESS = {"sgd"}
infos = pytest.mark.parametrize("name", INFOS)
trained = pytest.mark.parametrize("name", [n for n in INFOS if n != "lstm"])  # has a direction
inputs = pytest.mark.parametrize("at", range(len(FRIENDLY)), ids=lambda i: f"inputs {i}")


def problem(contiguous=True):
    """Weight, bias, and a closure factory of a small quadratic."""

    def drawn(*shape):
        x = torch.randn(*shape, 2, generator=fold_in(0, *shape))[..., 0]
        x = x.clone() if contiguous else x
        return x.requires_grad_()

    weight, bias, x = drawn(10, 5), drawn(10), torch.randn(5, generator=fold_in(1))

    def closure_of(opt):
        def closure():
            opt.zero_grad()
            loss = (weight.mv(x) + bias).square().sum()
            loss.backward()
            return loss

        return closure

    return weight, bias, closure_of


def fixed_gradients(params, t):
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=fold_in(t, i), dtype=torch.float64).to(p.dtype)


@trained
@inputs
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_goes_the_right_way(name, at, contiguous):
    info, options = INFOS[name], copy.deepcopy(FRIENDLY[at])
    weight, bias, closure_of = problem(contiguous)
    opt = info.build([weight, bias], **options)
    closure = closure_of(opt)
    first = closure().item()
    for _ in range(20):
        opt.step(closure)
    last = closure().item()
    assert last > first if options.get("maximize") else last < first


@trained
@pytest.mark.parametrize("scheduler", range(len(SCHEDULERS)))
def test_goes_the_right_way_with_a_scheduler_and_groups(name, scheduler):
    weight, bias, closure_of = problem()
    groups = [{"params": [weight], "lr": 0.5}, {"params": [bias]}]
    opt = INFOS[name].build(groups)
    schedulers = [SCHEDULERS[scheduler](opt)]
    closure = closure_of(opt)
    first = closure().item()
    for _ in range(20):
        loss = opt.step(closure)
        for s in schedulers:
            s.step(*([loss.detach()] if isinstance(s, S.ReduceLROnPlateau) else []))
    assert closure().item() < first


@infos
def test_a_rate_as_a_tensor_is_the_rate_as_a_number(name):
    def run(lr):
        params = [torch.ones(3, 2, requires_grad=True), torch.ones(4, requires_grad=True)]
        opt = INFOS[name].build(params, lr=lr, weight_decay=0.1)
        scheduler = S.ExponentialLR(opt, 0.5)
        for t in range(5):
            fixed_gradients(params, t)
            opt.step()
            scheduler.step()
        return params, opt

    (a, one), (b, two) = run(0.5), run(torch.tensor(0.5))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)
    assert isinstance(two.param_groups[0]["lr"], torch.Tensor)
    assert float(two.param_groups[0]["lr"]) == one.param_groups[0]["lr"]


@infos
@inputs
def test_nothing_happens_without_gradients(name, at):
    param = torch.randn(2, 3, generator=fold_in(0), requires_grad=True)
    before = param.detach().clone()
    opt = INFOS[name].build([param], **copy.deepcopy(FRIENDLY[at]))
    opt.step()
    assert torch.equal(param, before)
    assert not opt.state


@pytest.mark.parametrize("name", ["adam", "sgd", "sgd with momentum"])
def test_nothing_happens_for_gradients_that_are_zero(name):
    param = torch.randn(2, 3, generator=fold_in(0), requires_grad=True)
    before = param.detach().clone()
    opt = INFOS[name].build([param])
    param.grad = torch.zeros_like(param)
    opt.step()
    assert torch.equal(param, before)


@infos
@inputs
def test_gradients_are_not_changed(name, at):
    params = [torch.ones(2, 3, requires_grad=True), torch.ones(2, requires_grad=True)]
    opt = INFOS[name].build(params, **copy.deepcopy(FRIENDLY[at]))
    fixed_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    for _ in range(2):
        opt.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@infos
@inputs
def test_there_is_state_of_the_right_kinds(name, at):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        params = [torch.ones(2, 3, dtype=dtype, requires_grad=True)]
        opt = INFOS[name].build(params, **copy.deepcopy(FRIENDLY[at]))
        fixed_gradients(params, 0)
        opt.step()
        state = opt.state_dict()["state"]
        held = name not in STATELESS or FRIENDLY[at].get("nonfinite") == "skip"
        assert bool(state) == held
        assert all(
            x.dtype in (torch.promote_types(dtype, torch.float32), torch.int64)
            for s in state.values()
            for x in s.values()
        )


@infos
@inputs
def test_a_saved_state_is_loaded_equal_and_goes_on_equal(name, at, kit):
    info = INFOS[name]
    params = [torch.ones(3, 2, requires_grad=True), torch.ones(4, requires_grad=True)]
    opt = info.build(params, **copy.deepcopy(FRIENDLY[at]))
    for t in range(3):
        fixed_gradients(params, t)
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    loaded = kit.through_file(saved)
    twins = [p.detach().clone().requires_grad_() for p in params]
    other = info.build(twins, **copy.deepcopy(FRIENDLY[at]))
    other.load_state_dict(loaded)
    for a, b in ((saved, loaded), (saved, other.state_dict())):
        assert a["param_groups"] == b["param_groups"]
        assert a["state"].keys() == b["state"].keys()
        for k, s in a["state"].items():
            assert s.keys() == b["state"][k].keys()
            assert all(torch.equal(x, b["state"][k][n]) for n, x in s.items())
    for t in range(3, 6):
        for ps, o in ((params, opt), (twins, other)):
            fixed_gradients(ps, t)
            o.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    other.param_groups.extend(other.param_groups)  # repeated parameters, one representation
    assert (
        opt.state_dict()["param_groups"][-1]["params"]
        == other.state_dict()["param_groups"][-1]["params"]
    )


@infos
def test_a_state_dict_with_a_number_for_a_count_may_be_loaded(name):
    param = torch.ones(3, requires_grad=True)
    opt = INFOS[name].build([param])
    fixed_gradients([param], 0)
    opt.step()
    state = opt.state_dict()
    for s in state["state"].values():
        for k, x in s.items():
            if x.dtype is torch.int64:
                s[k] = x.item()
    opt.load_state_dict(state)
    opt.step()
    assert all(isinstance(x, torch.Tensor) for s in opt.state.values() for x in s.values())


@infos
def test_a_param_group_takes_its_own_decay(name):
    def moved(decay):
        params = [torch.full((2,), 4.0, requires_grad=True), torch.ones(2, requires_grad=True)]
        groups = [{"params": params[:1], "weight_decay": decay}, {"params": params[1:]}]
        opt = INFOS[name].build(groups, lr=0.5)
        fixed_gradients(params, 0)
        opt.step()
        return [p.detach() for p in params]

    (a, b), (c, d) = moved(0.25), moved(0.0)
    torch.testing.assert_close(c - a, torch.full((2,), 0.5))
    assert torch.equal(b, d)


@infos
def test_hooks_in_their_order(name):
    param, calls = torch.ones(2, requires_grad=True), []
    opt = INFOS[name].build([param])
    fixed_gradients([param], 0)
    hooks = [
        opt.register_step_pre_hook(lambda *_: calls.append(1)),
        opt.register_step_pre_hook(lambda *_: calls.append(2)),
        opt.register_step_post_hook(lambda *_: calls.append(3)),
        opt.register_state_dict_pre_hook(lambda *_: calls.append(5)),
        opt.register_state_dict_pre_hook(lambda *_: calls.append(4), prepend=True),
        opt.register_load_state_dict_post_hook(lambda *_: calls.append(7)),
        opt.register_load_state_dict_post_hook(lambda *_: calls.append(6), prepend=True),
    ]
    opt.step()
    opt.load_state_dict(opt.state_dict())
    for hook in hooks:
        hook.remove()
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert calls == [1, 2, 3, 4, 5, 6, 7]


@infos
def test_an_averaged_model(name, kit):
    model = kit.net()
    opt = INFOS[name].build(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    kit.train(model, opt, 0, 3)
    average.update_parameters(model)
    assert kit.same(average.module, model)


@infos
def test_another_default_dtype(name):
    torch.set_default_dtype(torch.float64)
    try:
        param = torch.ones(2, 2, dtype=torch.float32, requires_grad=True)
        opt = INFOS[name].build([param], nonfinite="skip")
        fixed_gradients([param], 0)
        opt.step()
        kinds = {x.dtype for s in opt.state.values() for x in s.values()}
    finally:
        torch.set_default_dtype(torch.float32)
    assert kinds <= {torch.float32, torch.int64}


def test_errors_that_torch_asks_of_all_optimizers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims
    for case in get_error_inputs_for_all_optims("cpu", torch.float32):
        given = case.optimizer_error_input
        params = [nn.Parameter(torch.ones(1))] if given.params is None else given.params
        catch = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        for info in INFOS.values():
            with catch(case.error_type, match=case.error_regex):
                info.build(params, **given.kwargs)
