"""accelerate: prepared objects, gradient accumulation, mixed precision, saved states."""

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
    warnings.simplefilter("ignore")  # what its imports warn of is not ours
    accelerate = pytest.importorskip("accelerate")

STEPS, BATCH = 6, 4
RULES = {
    "adam": lambda params: LearnedOptimizer(params, "adam", lr=10.0),
    "basis_mlp": lambda params: LearnedOptimizer(params, "basis_mlp", num_steps=STEPS),
    "lstm": lambda params: LearnedOptimizer(params, "lstm", lr=0.1),
}


class ByLoss:
    needs = frozenset({"loss"})
    init = staticmethod(lambda generator: {})
    init_hidden = staticmethod(lambda th, p: {})
    update = staticmethod(lambda th, p, g, h, loss, extras: (-0.1 * loss / (1 + loss) * g, h))


@pytest.fixture(autouse=True)
def fresh():
    """accelerate keeps its settings in classes; each test has its own."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def net():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def loader():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS * BATCH, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=BATCH)


def schedule_of(opt):
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))


def prepared(build, **arguments):
    accelerator = accelerate.Accelerator(cpu=True, **arguments)
    model = net()
    opt = build(model.parameters())
    return accelerator, *accelerator.prepare(model, opt, loader(), schedule_of(opt))


def train(accelerator, model, opt, batches, schedule, first=0, last=STEPS, clip=None):
    for x, y in list(batches)[first:last]:
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(x), y)
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            opt.step(lambda loss=loss: loss)
            schedule.step()
            opt.zero_grad()


def plain(build, accumulate=1, clip=None):
    model = net()
    opt = build(model.parameters())
    schedule = schedule_of(opt)
    for i, (x, y) in enumerate(loader()):
        loss = F.mse_loss(model(x), y)
        (loss / accumulate).backward()
        if (i + 1) % accumulate:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step(loss=loss)
        schedule.step()
        opt.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("rule", [*RULES, "by_loss"])
def test_training_is_that_of_a_plain_loop(rule):
    by_loss = lambda params: LearnedOptimizer(params, fmeta.tensorwise(ByLoss))
    build = RULES.get(rule, by_loss)
    accelerator, model, *rest = prepared(build)
    train(accelerator, model, *rest)
    assert_close(model.state_dict(), plain(build), rtol=0, atol=0)


def test_gradient_accumulation_and_clipping():
    accelerator, model, *rest = prepared(RULES["adam"], gradient_accumulation_steps=2)
    train(accelerator, model, *rest, clip=0.1)
    want = plain(RULES["adam"], accumulate=2, clip=0.1)
    assert_close(model.state_dict(), want, rtol=0, atol=0)


def test_bfloat16_autocast_keeps_the_state_in_float32():
    accelerator, model, opt, *rest = prepared(RULES["adam"], mixed_precision="bf16")
    train(accelerator, model, opt, *rest)
    assert {s["m"].dtype for s in opt.state.values()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rule", RULES)
def test_a_saved_state_goes_on_to_the_same_bits(rule, tmp_path):
    whole = prepared(RULES[rule])
    train(*whole)
    accelerator, *rest = prepared(RULES[rule])
    train(accelerator, *rest, last=STEPS // 2)
    accelerator.save_state(str(tmp_path / "half"))
    accelerator, *rest = prepared(RULES[rule])
    accelerator.load_state(str(tmp_path / "half"))
    train(accelerator, *rest, first=STEPS // 2)
    assert_close(rest[0].state_dict(), whole[1].state_dict(), rtol=0, atol=0)
