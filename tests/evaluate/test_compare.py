"""Loss curves side by side: the same starts and batches for all."""

import torch

import fmeta
from fmeta import evaluate, optimizers
from fmeta.tasks import digits, loss_of_task, sample_task

DOUBLE = {"dtype": torch.float64}
STEPS, SEEDS = 10, 3


LENGTHS = {"num_steps": STEPS, "num_seeds": SEEDS, "seed": 5}


def test_all_start_alike_and_see_the_same_batches(quadratics):
    curves = evaluate.compare(
        quadratics,
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


def test_curves_are_those_of_unroll_on_each_seed(quadratics):
    rule = optimizers.adam(0.1)
    got = evaluate.compare(quadratics, {"a": (rule, {})}, **LENGTHS)["a"]
    assert got.train.shape == got.held_out.shape == (SEEDS, STEPS)
    for i in range(SEEDS):
        task = sample_task(quadratics, STEPS, 5, i)
        shown = sample_task(quadratics, STEPS, 5, i, split="test")
        run = fmeta.unroll(
            rule,
            loss_of_task(quadratics),
            {},
            task.model_params,
            task.batches,
            loss_args=({},),
            eval_batches=shown.batches,
        )
        torch.testing.assert_close(got.train[i], run.losses)
        torch.testing.assert_close(got.held_out[i], run.eval_losses)


def test_another_seed_gives_other_tasks(quadratics):
    one, two = (
        evaluate.compare(quadratics, {"a": (optimizers.sgd(), {})}, **{**LENGTHS, "seed": s})["a"]
        for s in (5, 6)
    )
    assert not torch.equal(one.train, two.train)


def test_a_learned_rule_is_compared_with_its_parameters(quadratics):
    rule = fmeta.learn(optimizers.sgd, {"lr": "linear"}, lr=0.1)
    half = {"lr": torch.tensor(0.2, **DOUBLE)}
    curves = evaluate.compare(
        quadratics, {"learned": (rule, half), "plain": (optimizers.sgd(0.2), {})}, **LENGTHS
    )
    torch.testing.assert_close(curves["learned"].train, curves["plain"].train)


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


def test_tasks_go_where_the_data_is(quadratics):
    family = quadratics._replace(data=quadratics.data.to("meta"))
    curves = evaluate.compare(family, {"a": (optimizers.sgd(0.1), {})}, **LENGTHS)["a"]
    assert curves.train.device.type == curves.held_out.device.type == "meta"
