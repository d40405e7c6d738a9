"""Gradients that are infinite or NaN: let through, left out and counted, or an error."""

import pytest
import torch

from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer

BAD = [torch.inf, -torch.inf, torch.nan]


def snapshot(model, opt):
    state = {(i, k): x.clone() for i, s in enumerate(opt.state.values()) for k, x in s.items()}
    return [p.detach().clone() for p in model.parameters()], state


def unchanged(model, opt, before):
    params, state = before
    now = {(i, k): x for i, s in enumerate(opt.state.values()) for k, x in s.items()}
    assert now.keys() == state.keys()
    return all(torch.equal(p, q) for p, q in zip(params, model.parameters(), strict=True)) and all(
        torch.equal(now[k], x) for k, x in state.items() if k[1] != "skipped_steps"
    )


def spoiled_step(kit, model, opt, t, bad):
    opt.zero_grad()
    loss = kit.loss_of(model, t)
    loss.backward()
    model[2].weight.grad[0, 3] = bad
    opt.step(loss=loss.detach())


# With values that are looked at on the CPU, and with masks, as on other devices and compiled.
HOW = {"by value": {}, "by mask": {"compile": {"backend": "eager", "fullgraph": True}}}


@pytest.mark.parametrize(
    ("rule", "bad", "how"),
    [
        *(("adam", bad, how) for bad in BAD for how in HOW),
        ("basis_mlp", torch.nan, "by value"),
        ("basis_mlp", torch.nan, "by mask"),
    ],
    ids=str,
)
def test_skipped_steps_change_nothing_and_are_counted(rule, bad, how, kit):
    def build(model):
        return LearnedOptimizer(
            model.parameters(), rule, lr=0.5, weight_decay=0.1, num_steps=9, nonfinite="skip",
            **HOW[how],
        )  # fmt: skip

    model = kit.net()
    with torch.no_grad():
        model[0].bias[:2] = torch.tensor([0.0, -0.0])
    opt = build(model)
    assert opt.skipped_steps.item() == 0
    spoiled_step(kit, model, opt, 0, bad)  # the very first one
    assert opt.skipped_steps.item() == 1
    assert model[0].bias[:2].signbit().tolist() == [False, True]
    kit.train(model, opt, 1, 3)
    before = snapshot(model, opt)
    spoiled_step(kit, model, opt, 3, bad)
    assert unchanged(model, opt, before)
    kit.train(model, opt, 4, 5)
    assert opt.skipped_steps.item() == 2
    assert opt.skipped_steps.dtype is torch.int64

    plain = kit.net()
    with torch.no_grad():
        plain[0].bias[:2] = torch.tensor([0.0, -0.0])
    other = LearnedOptimizer(plain.parameters(), rule, lr=0.5, weight_decay=0.1, num_steps=9)
    kit.train(plain, other, 1, 3)
    kit.train(plain, other, 4, 5)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)

    again = build(model)
    again.load_state_dict(kit.through_file(opt.state_dict()))
    assert again.skipped_steps.item() == 2


def test_the_error_names_the_parameters_and_nothing_has_changed(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.named_parameters(), "adam", nonfinite="raise")
    kit.train(model, opt, 0, 2)
    before = snapshot(model, opt)
    with pytest.raises(FloatingPointError, match=r"gradient of parameter 2\.weight;.*'skip'"):
        spoiled_step(kit, model, opt, 2, torch.nan)
    assert unchanged(model, opt, before)
    kit.train(model, opt, 2, 3)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_loss_counts_where_the_rule_reads_it(nonfinite, kit):
    for rule, reads in (("velo", True), ("adam", False)):
        model = kit.net()
        opt = LearnedOptimizer(model.parameters(), rule, num_steps=9, nonfinite=nonfinite)
        kit.loss_of(model, 0).backward()
        before = snapshot(model, opt)
        if reads and nonfinite == "raise":
            with pytest.raises(FloatingPointError, match="the loss"):
                opt.step(loss=torch.nan)
        else:
            opt.step(loss=torch.nan)
            same = all(map(torch.equal, before[0], model.parameters()))
            assert same == reads
            assert opt.skipped_steps.item() == int(reads)


def test_by_default_they_go_through_as_in_torch(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), optimizers.sgd(0.1))
    spoiled_step(kit, model, opt, 0, torch.nan)
    assert model[2].weight[0, 3].isnan()
    assert model[0].weight.isfinite().all()


def test_large_but_finite_gradients_are_no_reason_to_skip(kit):
    for dtype in (torch.float32, torch.float64, torch.float16):
        w = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        empty = torch.nn.Parameter(torch.zeros(0, dtype=dtype))
        opt = LearnedOptimizer([w, empty], optimizers.sgd(1e-3), nonfinite="skip")
        w.grad = torch.full_like(w, torch.finfo(dtype).max)
        empty.grad = torch.zeros_like(empty)
        opt.step()
        assert opt.skipped_steps.item() == 0, dtype
        assert (w != 0).all(), dtype


@pytest.mark.parametrize("capturable", [False, True])
def test_a_state_that_was_saved_without_a_count_gets_one(capturable, kit):
    model = kit.net()
    plain = LearnedOptimizer(model.parameters(), "basis_mlp", num_steps=9)
    kit.train(model, plain, 0, 2)
    opt = LearnedOptimizer(
        model.parameters(), "basis_mlp", num_steps=9, nonfinite="skip", capturable=capturable
    )
    opt.load_state_dict(plain.state_dict())
    for t in (2, 3):
        spoiled_step(kit, model, opt, t, torch.nan)
    assert opt.skipped_steps.item() == 2
    assert opt.state_dict()["state"][3]["skipped_steps"].item() == 2
    plain.load_state_dict(opt.state_dict())  # and back
    kit.train(model, plain, 4, 5)
