"""PEFT: the adapter's parameters are trained, the model's own are left alone."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fmeta
from fmeta.torch_optim import LearnedOptimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its imports warn of is not ours
    peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def lora():
    config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["last"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(Net(), config)


def train(model, opt, steps):
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)
        opt.zero_grad()
        (model(x) - x[:, :2].sin()).square().mean().backward()
        opt.step()


RULES = {
    "adam": lambda: fmeta.optimizers.adam(0.01),
    "normalized_mlp": lambda: fmeta.optimizers.normalized_mlp(0.01),
    "basis_mlp": lambda: fmeta.optimizers.basis_mlp(),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("given", ["all", "trainable"])
def test_only_the_adapter_is_trained(rule, given):
    """Whether the optimizer is given all parameters, with their names, or the trainable ones."""
    model = lora()
    named = [(n, p) for n, p in model.named_parameters() if given == "all" or p.requires_grad]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = LearnedOptimizer(named, RULES[rule](), num_steps=3)
    train(model, opt, 3)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained
    assert {n for n in trained if "lora_" in n or "modules_to_save" in n} == trained
    assert {n for n, p in named if p in opt.state} == trained


def test_frozen_parameters_do_not_change_the_training():
    """The rule that looks at all tensors sees the same with frozen ones beside."""
    models = lora(), lora()
    for model, frozen in zip(models, (True, False), strict=True):
        params = [p for p in model.parameters() if frozen or p.requires_grad]
        train(model, LearnedOptimizer(params, "basis_mlp", num_steps=3), 3)
    assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-6, atol=1e-7)


def test_a_saved_adapter_and_state_go_on_to_the_same_bits(tmp_path):
    def build():
        model = lora()
        params = [p for p in model.parameters() if p.requires_grad]
        return model, LearnedOptimizer(params, "adam", lr=10.0)

    model, opt = build()
    train(model, opt, 2)
    adapter = {k: x.clone() for k, x in peft.get_peft_model_state_dict(model).items()}
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    train(model, opt, 2)

    other, again = build()
    peft.set_peft_model_state_dict(other, adapter)
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    train(other, again, 2)
    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
