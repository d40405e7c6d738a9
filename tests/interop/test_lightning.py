"""Lightning: automatic and manual optimisation, schedulers, clipping, checkpoints."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import fmeta
from fmeta.torch_optim import LearnedOptimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning's imports warn of is not ours
    lightning = pytest.importorskip("lightning")

BATCHES, EPOCHS = 4, 3

pytestmark = [
    # Lightning's own use of torch's trees, and its advice on speed.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Module(lightning.LightningModule):
    def __init__(self, build, schedule=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        self.build, self.schedule = build, schedule

    def training_step(self, batch, index):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        opt = self.build(self.parameters())
        if self.schedule is None:
            return opt
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, self.schedule)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(Module):
    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        opt = self.optimizers()
        opt.zero_grad()
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        opt.step(loss=loss)


class ByLoss:
    needs = frozenset({"loss"})
    init = staticmethod(lambda generator: {})
    init_hidden = staticmethod(lambda th, p: {})
    update = staticmethod(lambda th, p, g, h, loss, extras: (-0.1 * loss / (1 + loss) * g, h))


RULES = {
    "adam": lambda params: LearnedOptimizer(params, "adam", lr=10.0),
    "basis_mlp": lambda params: LearnedOptimizer(params, "basis_mlp", num_steps=BATCHES * EPOCHS),
    "by_loss": lambda params: LearnedOptimizer(params, fmeta.tensorwise(ByLoss)),
}


def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8 * BATCHES, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def loader():
    return DataLoader(data(), batch_size=8)


def trainer(folder, **arguments):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    arguments = {"max_epochs": EPOCHS, **quiet, **arguments}
    return lightning.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **arguments)


def plain(build, schedule=None, clip=None, accumulate=1):
    """The same training as a loop of torch."""
    module = Module(build)
    opt = build(module.parameters())
    schedule = schedule and torch.optim.lr_scheduler.LambdaLR(opt, schedule)
    for _ in range(EPOCHS):
        for i, batch in enumerate(loader()):
            loss = module.training_step(batch, i) / accumulate
            loss.backward()
            if (i + 1) % accumulate:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            opt.step(loss=loss)
            opt.zero_grad()
            if schedule:
                schedule.step()
    return module.net.state_dict()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [Module, Manual])
def test_training_is_that_of_a_plain_loop(rule, kind, tmp_path):
    module = kind(RULES[rule])
    trainer(tmp_path).fit(module, loader())
    assert_close(module.net.state_dict(), plain(RULES[rule]), rtol=0, atol=0)


def test_schedule_clipping_and_accumulation(tmp_path):
    schedule = lambda t: 1 / (1 + t)
    module = Module(RULES["adam"], schedule)
    run = trainer(tmp_path, gradient_clip_val=0.1, accumulate_grad_batches=2)
    run.fit(module, loader())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        10 / (1 + BATCHES * EPOCHS // 2)
    )
    want = plain(RULES["adam"], schedule, clip=0.1, accumulate=2)
    assert_close(module.net.state_dict(), want, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_training_ends_in_the_same_bits(rule, tmp_path):
    schedule = lambda t: 1 / (1 + t)
    whole = Module(RULES[rule], schedule)
    trainer(tmp_path).fit(whole, loader())

    first = Module(RULES[rule], schedule)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "stopped.ckpt")
    second = Module(RULES[rule], schedule)
    trainer(tmp_path).fit(second, loader(), ckpt_path=tmp_path / "stopped.ckpt")
    assert_close(second.net.state_dict(), whole.net.state_dict(), rtol=0, atol=0)
