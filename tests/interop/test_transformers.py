"""Hugging Face `Trainer` on a small model made from its configuration; nothing is fetched."""

import contextlib
import io
import warnings

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

import fmeta
from fmeta.torch_optim import LearnedOptimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its imports warn of is not ours
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

STEPS, BATCH = 6, 4


class ByLoss:
    needs = frozenset({"loss"})
    init = staticmethod(lambda generator: {})
    init_hidden = staticmethod(lambda th, p: {})
    update = staticmethod(lambda th, p, g, h, loss, extras: (-0.1 * loss / (1 + loss) * g, h))


def model():
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        attn_implementation="eager",
    )
    made = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return made


def data():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(1, 11, (BATCH * STEPS, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


class Trainer(transformers.Trainer):
    """In the order of the data."""

    def get_train_dataloader(self):
        collate = transformers.default_data_collator
        loader = DataLoader(self.train_dataset, batch_size=BATCH, collate_fn=collate)
        return self.accelerator.prepare(loader)


class TellsTheLoss(Trainer):
    """For rules that read the loss, which the Trainer's call of `step` does not pass."""

    def create_optimizer(self, *args):
        opt = super().create_optimizer(*args)
        opt.register_step_pre_hook(
            lambda opt, args, kwargs: (args, {**kwargs, "loss": self.last_loss})
        )
        return opt

    def training_step(self, *args, **kwargs):
        self.last_loss = super().training_step(*args, **kwargs)
        return self.last_loss


def trained(folder, kind=Trainer, resume=None, options=None, **arguments):
    """A model after training, and its Trainer."""
    made = model()
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    if "optimizers" in arguments:
        arguments["optimizers"] = (arguments["optimizers"](made.parameters()), None)
    run = kind(
        model=made,
        args=transformers.TrainingArguments(str(folder), **{**settings, **(options or {})}),
        train_dataset=data(),
        **arguments,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its summary
        run.train(resume_from_checkpoint=resume)
    return made.state_dict(), run


RULES = {
    "adam": lambda params: LearnedOptimizer(params, "adam", lr=10.0),
    "basis_mlp": lambda params: LearnedOptimizer(params, "basis_mlp", num_steps=STEPS),
    "lstm": lambda params: LearnedOptimizer(params, "lstm", lr=0.1),
}


def test_it_trains_as_with_an_optimizer_of_torch(tmp_path):
    """With its linear schedule and clipping, to rounding."""
    ours, run = trained(tmp_path, optimizers=RULES["adam"])
    theirs, _ = trained(tmp_path, optimizers=lambda params: torch.optim.Adam(params, lr=0.01))
    assert run.state.global_step == STEPS
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert any((ours[name] != x).any() for name, x in model().state_dict().items())


def test_class_and_arguments(tmp_path):
    """The Trainer makes the groups, with decay and without."""
    options = {"weight_decay": 0.1}
    kind = (LearnedOptimizer, {"name_or_optimizer": "adam", "lr": 10.0})
    ours, run = trained(tmp_path, options=options, optimizer_cls_and_kwargs=kind)
    groups = run.optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    # Decay is times lr, and ours is 1000 times the rate of the rule.
    kind = (torch.optim.AdamW, {"lr": 0.01})
    options = {"weight_decay": 100.0}
    theirs, _ = trained(tmp_path, options=options, optimizer_cls_and_kwargs=kind)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_training_ends_in_the_same_bits(rule, tmp_path):
    options = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole, _ = trained(tmp_path, optimizers=RULES[rule], options=options)
    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert set(saved) == {"state", "param_groups"}
    assert set(saved["state"]) == set(saved["param_groups"][0]["params"])
    again, _ = trained(tmp_path / "again", optimizers=RULES[rule], resume=str(checkpoint))
    assert_close(again, whole, rtol=0, atol=0)


def test_gradient_accumulation(tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_steps": STEPS // 2}
    ours, _ = trained(tmp_path, optimizers=RULES["adam"], options=options)
    kind = lambda params: torch.optim.Adam(params, lr=0.01)
    theirs, _ = trained(tmp_path, optimizers=kind, options=options)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_rule_that_needs_the_loss_gets_it_from_a_hook(tmp_path):
    kind = (LearnedOptimizer, {"name_or_optimizer": fmeta.tensorwise(ByLoss)})
    found, _ = trained(tmp_path, TellsTheLoss, optimizer_cls_and_kwargs=kind)
    assert any((found[name] != x).any() for name, x in model().state_dict().items())
    with pytest.raises(ValueError, match="needs the loss"):
        trained(tmp_path, optimizer_cls_and_kwargs=kind)
