"""torch.distributed.checkpoint in one process, and what its state_dict functions need of a rule."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fmeta
from fmeta.torch_optim import LearnedOptimizer

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    # torch.distributed.checkpoint says that there is one process, which is meant.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninit"),
]
RULES = ["sgd", "adam", "normalized_mlp", "basis_mlp", "lstm", "clipped"]


class ByLoss:
    """A rule that cannot do without the loss."""

    needs = frozenset({"loss"})
    init = staticmethod(lambda generator: {})
    init_hidden = staticmethod(lambda th, p: {"count": torch.zeros((), dtype=torch.int64)})

    @staticmethod
    def update(th, p, g, h, loss, extras):
        return -0.1 * loss * g / (1 + h["count"]), {"count": h["count"] + 1}


def negated(model):
    with torch.no_grad():
        for p in model.parameters():
            p.neg_()
    return model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_loaded_training_goes_on_to_the_same_bits(rule, flat, parallel, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    options = sd.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = parallel.net()
    opt = parallel.optimizer(model.parameters(), rule)
    parallel.train(model, opt, 0, 3)
    weights, state = sd.get_state_dict(model, opt, options=options)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=str(tmp_path / "dcp"))
    parallel.train(model, opt, 3)

    other = negated(parallel.net())
    loaded = parallel.optimizer(other.parameters(), rule)
    weights, state = sd.get_state_dict(other, loaded, options=options)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=str(tmp_path / "dcp"))
    sd.set_state_dict(
        other, loaded, model_state_dict=weights, optim_state_dict=state, options=options
    )
    parallel.train(other, loaded, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rule", RULES)
def test_saving_before_the_first_step_changes_nothing(rule, parallel):
    from torch.distributed.checkpoint import state_dict as sd

    model, other = parallel.net(), parallel.net()
    opt = parallel.optimizer(model.parameters(), rule)
    saved = parallel.optimizer(other.parameters(), rule)
    state = sd.get_optimizer_state_dict(other, saved)
    assert set(state["state"]) == (set() if rule == "sgd" else set(dict(other.named_parameters())))
    parallel.train(model, opt)
    parallel.train(other, saved)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_warm_up_that_begins_at_zero_is_a_step_of_training(parallel):
    model = parallel.net()
    opt = parallel.optimizer(model.parameters(), "adam")
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: t / 3)
    parallel.train(model, opt, 0, 1)
    assert {int(opt.state[p]["count"]) for p in model.parameters()} == {1}
    assert opt.param_groups[0]["lr"] == 0
    schedule.step()
    for (name, p), start in zip(model.named_parameters(), parallel.net().parameters(), strict=True):
        assert torch.equal(p, start), name


def test_a_rule_that_needs_the_loss_gives_and_takes_its_state(parallel):
    from torch.distributed.checkpoint import state_dict as sd

    model = parallel.net()
    rule = fmeta.tensorwise(ByLoss)
    opt = LearnedOptimizer(model.parameters(), rule)
    state = sd.get_optimizer_state_dict(model, opt)  # which knows of no loss
    assert int(state["state"]["head.bias"]["count"]) == 0
    x, y = parallel.batches()[0]
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    opt.step(loss=loss)
    state = sd.get_optimizer_state_dict(model, opt)
    loaded = LearnedOptimizer(model.parameters(), rule)
    sd.set_optimizer_state_dict(model, loaded, state)
    assert {int(loaded.state[p]["count"]) for p in model.parameters()} == {1}
    with pytest.raises(ValueError, match="needs the loss"):
        loaded.step()


def test_groups_and_frozen_parameters(parallel):
    from torch.distributed.checkpoint import state_dict as sd

    def build():
        model = parallel.net()
        model.block.norm.requires_grad_(False)
        groups = [
            {"params": model.block.parameters(), "weight_decay": 0.1},
            {"params": model.head.parameters(), "lr": 0.25},
        ]
        return model, LearnedOptimizer(groups, "adam", lr=0.5)

    model, opt = build()
    opt.param_groups[0]["lr"] = 0.125  # as a scheduler would
    parallel.train(model, opt, 0, 3)
    full = sd.StateDictOptions(full_state_dict=True)
    weights, state = sd.get_state_dict(model, opt, options=full)
    assert "block.norm.weight" not in state["state"]
    other, loaded = build()
    sd.set_state_dict(other, loaded, model_state_dict=weights, optim_state_dict=state, options=full)
    assert [g["lr"] for g in loaded.param_groups] == [0.125, 0.25]
    assert [g["weight_decay"] for g in loaded.param_groups] == [0.1, 0.0]
    parallel.train(model, opt, 3)
    parallel.train(other, loaded, 3)
    assert_close(parallel.weights(other), parallel.weights(model), rtol=0, atol=0)


def test_the_state_of_other_weights_is_refused(parallel):
    from torch.distributed.checkpoint import state_dict as sd

    model = parallel.net()
    opt = parallel.optimizer(model.parameters(), "lstm")
    state = sd.get_optimizer_state_dict(model, opt)
    rule = fmeta.optimizers.lstm(hidden_size=3, num_layers=1)
    other = LearnedOptimizer(
        model.parameters(), rule, rule.init(torch.Generator().manual_seed(7)), lr=0.5
    )
    with pytest.raises(ValueError, match="weights"):
        sd.set_optimizer_state_dict(model, other, state)
