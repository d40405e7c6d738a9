"""State that is saved and loaded goes on as if nothing had happened, bit for bit."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fmeta
from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer

KNOWN = {"loss", "num_steps"}
OF_A_TREE = {  # builders that take the parameter tree first
    n
    for n, b in optimizers.BUILDERS.items()
    if any(p.default is p.empty for p in inspect.signature(b).parameters.values())
}
RULES = {
    **{n: n for n, b in optimizers.BUILDERS.items() if n in OF_A_TREE or b().needs <= KNOWN},
    "averaged": fmeta.averaged(optimizers.adam(0.01), decay=0.9),
    "lookahead": fmeta.lookahead(optimizers.adam(0.01), every=2),
    "accumulated": fmeta.accumulate(optimizers.adam(0.01), every=2),
    "combined": fmeta.chain(
        fmeta.clip_by_global_norm(1.0),
        fmeta.master_weights(fmeta.scheduled(optimizers.adam(0.01), lambda t, n: 1 / (1 + t))),
    ),
}

UNSCALED = ("schedule_free_adamw", "lookahead", "combined")  # must be applied as they are


def make(model, rule, **options):
    return LearnedOptimizer(model.parameters(), rule, num_steps=8, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_saved_and_loaded_in_the_middle(rule, dtype, kit):
    options = {} if rule in UNSCALED else {"lr": 0.5, "weight_decay": 0.1}
    whole = kit.net(dtype=dtype)
    kit.train(whole, make(whole, RULES[rule], **options), 0, 6)

    first = kit.net(dtype=dtype)
    opt = make(first, RULES[rule], **options)
    kit.train(first, opt, 0, 3)
    weights, state = kit.through_file((first.state_dict(), opt.state_dict()))

    later = kit.net(seed=7, dtype=dtype)
    later.load_state_dict(weights)
    opt = make(later, RULES[rule])
    opt.load_state_dict(state)
    kit.train(later, opt, 3, 6)
    assert kit.same(later, whole)


def test_nothing_is_cast(kit):
    model = kit.net(dtype=torch.bfloat16)
    opt = make(model, "basis_mlp")
    kit.train(model, opt, 0, 2)
    again = make(model, "basis_mlp")
    again.load_state_dict(kit.through_file(opt.state_dict()))
    for p in model.parameters():
        for k, x in opt.state[p].items():
            y = again.state[p][k]
            assert x.dtype == y.dtype != torch.bfloat16, k
            assert torch.equal(x, y), k


def test_state_follows_the_parameters_to_another_precision(kit):
    model = kit.net()
    opt = make(model, "adam")
    kit.train(model, opt, 0, 2)
    wide = kit.net(dtype=torch.float64)
    again = make(wide, "adam")
    again.load_state_dict(opt.state_dict())
    state = again.state[wide[0].weight]
    assert (state["m"].dtype, state["count"].dtype) == (torch.float64, torch.int64)
    kit.train(wide, again, 2, 3)


def test_loading_before_the_first_step_and_with_nothing_to_load(kit):
    model = kit.net()
    opt = make(model, "adam", lr=0.25)
    fresh = make(model, "adam")
    fresh.load_state_dict(kit.through_file(opt.state_dict()))
    assert fresh.param_groups[0]["lr"] == 0.25
    assert not fresh.state
    kit.train(model, fresh, 0, 1)


@pytest.mark.parametrize("capturable", [False, True])
def test_what_was_saved_in_memory_is_a_snapshot(capturable, kit):
    model, other = kit.net(), kit.net()
    opt = make(model, "adam", capturable=capturable)
    kit.train(model, opt, 0, 2)
    other.load_state_dict(model.state_dict())
    again = make(other, "adam", capturable=capturable)
    again.load_state_dict(opt.state_dict())
    before = [x.clone() for s in opt.state.values() for x in s.values()]
    kit.train(other, again, 2, 4)
    after = [x for s in opt.state.values() for x in s.values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_frozen_parameters_have_no_state_to_save(kit):
    model = kit.net()
    model[0].weight.requires_grad_(False)
    opt = make(model, "adam")
    kit.train(model, opt, 0, 2)
    state = kit.through_file(opt.state_dict())
    assert sorted(state["state"]) == [1, 2, 3]
    later = make(model, "adam")
    later.load_state_dict(state)
    model[0].weight.requires_grad_(True)
    kit.train(model, later, 2, 3)
    assert [later.state[p]["count"].item() for p in model.parameters()] == [1, 3, 3, 3]


def test_other_weights_are_refused_with_both_hashes(kit):
    model = kit.net()
    mine, other = optimizers.linear(lr=0.1).init(), optimizers.linear(lr=0.2).init()
    opt = LearnedOptimizer(model.parameters(), "linear", mine)
    again = LearnedOptimizer(model.parameters(), "linear", other)
    state = opt.state_dict()
    hashes = [o.param_groups[0]["weights_hash"] for o in (opt, again)]
    with pytest.raises(ValueError, match=f"{hashes[0][:12]}.*{hashes[1][:12]}.*weights_hash"):
        again.load_state_dict(state)
    for group in state["param_groups"]:  # the cure that the message names
        group["weights_hash"] = hashes[1]
    again.load_state_dict(state)
    assert again.param_groups[0]["weights_hash"] == hashes[1]


def test_the_state_of_another_rule_is_refused(kit):
    model = kit.net()
    opt = make(model, "adam")
    kit.train(model, opt, 0, 1)
    held = {k: dict(v) for k, v in opt.state.items()}
    muon = make(model, "muon")
    kit.train(model, muon, 0, 1)
    with pytest.raises(ValueError, match="state is of the rule muon, but the optimizer is adam"):
        opt.load_state_dict(muon.state_dict())
    nameless = muon.state_dict()
    for group in nameless["param_groups"]:
        group["rule"] = "custom"
    with pytest.raises(
        ValueError, match=r"state of parameter 0 holds count, m, but.*rule adam is count, m, v"
    ):
        opt.load_state_dict(nameless)
    assert {k: dict(v) for k, v in opt.state.items()} == held  # as it was
    with pytest.raises(ValueError, match=r"state is of no fmeta rule.*fresh state"):
        opt.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


def test_the_state_of_another_model_is_refused(kit):
    opt = make(kit.net(), "adam")
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    adam = make(other, "adam")
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    with pytest.raises(
        ValueError, match=r"state 'm' of parameter 0 has shape \(5, 3\), expected \(5, 4\)"
    ):
        opt.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        opt.load_state_dict(make(nn.Linear(1, 1), "adam").state_dict())


def test_options_that_an_older_version_did_not_have(kit):
    model, other = kit.net(), kit.net()
    opt = make(model, "adam")
    kit.train(model, opt, 0, 2)
    state = kit.through_file(opt.state_dict())
    for group in state["param_groups"]:
        for key in ("maximize", "foreach", "fused", "capturable", "differentiable", "num_steps"):
            del group[key]
    other.load_state_dict(model.state_dict())
    again = make(other, "adam")
    again.load_state_dict(state)
    kit.train(model, opt, 2, 4)
    kit.train(other, again, 2, 4)
    assert kit.same(model, other)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_from_and_to_named_parameters(saved, loaded, kit):
    def build(model, named):
        params = model.named_parameters() if named else model.parameters()
        return LearnedOptimizer(params, "basis_mlp", num_steps=9)

    model, other = kit.net(), kit.net()
    opt = build(model, saved)
    kit.train(model, opt, 0, 2)
    other.load_state_dict(model.state_dict())
    again = build(other, loaded)
    again.load_state_dict(opt.state_dict())
    assert ("param_names" in again.param_groups[0]) == loaded  # its own
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(x, again.state[q][k]) for k, x in opt.state[p].items())
    kit.train(other, again, 2, 3)


def test_hooks_of_saving_and_loading_see_the_whole_state(kit):
    model, calls = kit.net(), []
    opt = make(model, "adam")
    kit.train(model, opt, 0, 1)
    opt.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    opt.register_state_dict_post_hook(lambda o, d: calls.append(len(d["state"])))
    opt.register_load_state_dict_pre_hook(lambda o, d: calls.append(len(d["state"])))
    opt.register_load_state_dict_post_hook(lambda o: calls.append(len(o.state)))

    def renamed(o, state_dict):
        state_dict["state"] = {k: dict(v) for k, v in state_dict["state"].items()}
        state_dict["state"][0]["m"] = state_dict["state"][0]["m"] + 1
        return state_dict

    state = opt.state_dict()
    opt.register_load_state_dict_pre_hook(renamed)
    before = opt.state[model[0].weight]["m"]
    opt.load_state_dict(state)
    assert calls == ["saving", 4, 4, 4]
    assert torch.equal(opt.state[model[0].weight]["m"], before + 1)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_train_on_alike(how, kit):
    model = kit.net()
    opt = make(model, "lstm")
    kit.train(model, opt, 0, 2)
    model.opt = opt  # so that parameters and optimizer stay together
    twin = how({"model": model, "opt": opt})
    del model.opt
    model2, opt2 = twin["model"], twin["opt"]
    del model2.opt
    assert {k for k in vars(opt) if k[0] != "_"} == {k for k in vars(opt2) if k[0] != "_"}
    kit.train(model, opt, 2, 4)
    kit.train(model2, opt2, 2, 4)
    assert kit.same(model, model2)
    assert repr(opt) == repr(opt2)


def test_functions_cannot_be_pickled_and_the_error_says_what_can():
    opt = LearnedOptimizer([nn.Parameter(torch.ones(2))], optimizers.adam())
    with pytest.raises(TypeError, match=r"save opt.state_dict\(\)"):
        pickle.dumps(opt)


def test_saving_twice_gives_the_same(kit):
    model = kit.net()
    opt = make(model, "normalized_mlp")
    kit.train(model, opt, 0, 2)
    a, b = opt.state_dict(), opt.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert [list(s) for s in a["state"].values()] == [list(s) for s in b["state"].values()]
    for k, s in a["state"].items():
        assert all(torch.equal(x, b["state"][k][n]) for n, x in s.items())
