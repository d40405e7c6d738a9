"""Fair comparisons: the same starts and batches for all, honest intervals."""

import math

import pytest
import torch
from scipy import stats

import fmeta
from fmeta import evaluate, optimizers, plot
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily, digits, loss_of_task, sample_task

DOUBLE = {"dtype": torch.float64}
STEPS, SEEDS = 10, 3


def quadratics():
    return TaskFamily(
        torch.tensor(1.0, **DOUBLE),
        lambda generator: {},
        lambda config, generator: {"w": torch.randn(3, generator=generator, **DOUBLE)},
        lambda config, generator, steps, split="train": (
            0.1 * torch.randn(steps, 3, generator=generator, **DOUBLE) + (split == "test")
        ),
        lambda data, config, p, b: (p["w"] - b).square().sum(),
    )


FAMILY = quadratics()
LENGTHS = {"num_steps": STEPS, "num_seeds": SEEDS, "seed": 5}


def test_all_start_alike_and_see_the_same_batches():
    curves = evaluate.compare(
        FAMILY,
        {
            "a": (optimizers.sgd(0.1), {}),
            "b": (optimizers.adam(0.1), {}),
            "c": (optimizers.sgd(0.1), {}),
        },
        **LENGTHS,
    )
    assert torch.equal(curves["a"].train[:, 0], curves["b"].train[:, 0])
    assert torch.equal(curves["a"].train, curves["c"].train)
    assert torch.equal(curves["a"].held_out, curves["c"].held_out)
    assert not torch.equal(curves["a"].train[:, 1], curves["b"].train[:, 1])


def test_curves_are_those_of_unroll_on_each_seed():
    rule = optimizers.adam(0.1)
    got = evaluate.compare(FAMILY, {"a": (rule, {})}, **LENGTHS)["a"]
    assert got.train.shape == got.held_out.shape == (SEEDS, STEPS)
    for i in range(SEEDS):
        task = sample_task(FAMILY, STEPS, 5, i)
        shown = sample_task(FAMILY, STEPS, 5, i, split="test")
        run = fmeta.unroll(
            rule,
            loss_of_task(FAMILY),
            {},
            task.model_params,
            task.batches,
            loss_args=({},),
            eval_batches=shown.batches,
        )
        torch.testing.assert_close(got.train[i], run.losses)
        torch.testing.assert_close(got.held_out[i], run.eval_losses)


def test_another_seed_gives_other_tasks():
    one, two = (
        evaluate.compare(FAMILY, {"a": (optimizers.sgd(), {})}, **{**LENGTHS, "seed": s})["a"]
        for s in (5, 6)
    )
    assert not torch.equal(one.train, two.train)


def test_a_learned_rule_is_compared_with_its_parameters():
    rule = fmeta.learn(optimizers.sgd, {"lr": "linear"}, lr=0.1)
    half = {"lr": torch.tensor(0.2, **DOUBLE)}
    curves = evaluate.compare(
        FAMILY, {"learned": (rule, half), "plain": (optimizers.sgd(0.2), {})}, **LENGTHS
    )
    torch.testing.assert_close(curves["learned"].train, curves["plain"].train)


def test_tune_picks_the_rate_of_the_lowest_final_loss():
    rates = [1e-4, 0.03, 0.3, 3.0]
    got = evaluate.tune(FAMILY, optimizers.sgd, rates, **LENGTHS)
    scores = {
        lr: evaluate.final_loss(
            evaluate.compare(
                FAMILY, {"a": (optimizers.sgd(lr), {})}, **LENGTHS, held_out="validation"
            )["a"].held_out
        ).mean()
        for lr in rates
    }
    assert got == min(scores, key=scores.get)
    assert isinstance(got, float)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_rate_that_diverges_never_wins(position):
    rates = [0.1, 0.2]
    rates.insert(position, 1e300)  # its loss overflows to inf, then NaN
    assert evaluate.tune(FAMILY, optimizers.sgd, rates, **LENGTHS) in (0.1, 0.2)


def test_a_rate_whose_loss_becomes_minus_infinity_never_wins():
    family = FAMILY._replace(loss=lambda data, config, p, b: -(p["w"] ** 2).sum() + 0 * b.sum())
    steep = evaluate.tune(family, optimizers.sgd, [0.1, 1e200], **LENGTHS)
    assert steep == 0.1


def test_rates_that_all_diverge_are_an_error():
    with pytest.raises(ValueError, match=r"not finite for any of the rates \[1e\+300\]"):
        evaluate.tune(FAMILY, optimizers.sgd, [1e300], **LENGTHS)


def test_final_loss_is_the_mean_of_the_last_tenth():
    losses = torch.arange(40.0).reshape(2, 20)
    assert evaluate.final_loss(losses).tolist() == [18.5, 38.5]
    assert evaluate.final_loss(losses[:, :5]).tolist() == [4.0, 24.0]


@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_paired_interval_is_scipys(n):
    a = torch.randn(n, generator=fold_in(0), **DOUBLE)
    b = a + 0.1 * torch.randn(n, generator=fold_in(1), **DOUBLE) + 0.05
    mean, low, high = evaluate.paired_difference(a, b)
    want = stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval(0.95)
    assert (low, high) == pytest.approx(tuple(want))
    assert mean == pytest.approx((a - b).mean().item())


def test_a_paired_interval_needs_two_seeds():
    with pytest.raises(ValueError, match="at least two seeds"):
        evaluate.paired_difference(torch.ones(1), torch.ones(1))


def test_training_on_digits_beats_not_training():
    curves = evaluate.compare(
        digits((8,), batch_size=32),
        {"sgd": (optimizers.sgd(0.3), {}), "nothing": (optimizers.sgd(0.0), {})},
        num_steps=40,
        num_seeds=2,
        seed=0,
    )
    final = {k: evaluate.final_loss(c.held_out).mean().item() for k, c in curves.items()}
    assert final["sgd"] < 0.6 * final["nothing"]


def test_a_figure_is_drawn_of_curves_that_diverge_too(tmp_path):
    good = 2.0 - torch.rand(3, 20, generator=fold_in(2))
    bad = good.clone()
    bad[0, 10:] = math.nan
    path = tmp_path / "curves.png"
    panels = {"training": {"good": good, "bad": bad}, "held out": {"good": good}}
    plot.curves(path, panels, title="losses", mark=(10, "horizon"))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_tasks_go_where_the_data_is():
    family = FAMILY._replace(data=FAMILY.data.to("meta"))
    curves = evaluate.compare(family, {"a": (optimizers.sgd(0.1), {})}, **LENGTHS)["a"]
    assert curves.train.device.type == curves.held_out.device.type == "meta"
