"""Validation is the mean log loss at the end of plain trainings, the same ones each time."""

import torch

import fmeta
from fmeta.meta_train._digits_job import late_log_loss
from fmeta.meta_train._validation import Validation
from fmeta.tasks import digits, loss_of_task, sample_batches, sample_task

RULE = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.1)
FAMILY = digits((6,), batch_size=16)
STEPS, SEEDS, SEED = 5, 3, 11


def test_it_equals_unrolls_one_by_one():
    validation = Validation(RULE, FAMILY, num_steps=STEPS, num_seeds=SEEDS, seed=SEED)
    theta, logs = RULE.init(), []
    for i in range(SEEDS):
        task = sample_task(FAMILY, STEPS, SEED, i)
        run = fmeta.unroll(
            RULE, loss_of_task(FAMILY), theta, task.model_params, task.batches,
            loss_args=(task.config,),
        )  # fmt: skip
        shown = sample_batches(FAMILY, task.config, 8, SEED, i, 3, split="validation")
        losses = [FAMILY.loss(FAMILY.data, task.config, run.params, b) for b in shown]
        logs.append(torch.stack(losses).mean().log())
    torch.testing.assert_close(validation(theta), torch.stack(logs).mean())
    assert validation(theta) == validation(theta)


def test_a_rule_that_explodes_is_the_worst_and_not_nan():
    validation = Validation(RULE, FAMILY, num_steps=STEPS, num_seeds=SEEDS, seed=SEED)
    worst = validation({"lr": torch.tensor(80.0)})
    assert worst.isfinite()
    assert worst > validation(RULE.init())


def test_the_last_fifth_of_a_training_counts_eleven_times():
    losses = torch.full((10,), torch.e)
    weights = late_log_loss(losses, None, torch.arange(10), torch.tensor(10))
    torch.testing.assert_close(weights, torch.tensor([1.0] * 8 + [11.0] * 2) / 3)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


def test_evaluation_losses_come_before_training_losses():
    t, horizon = torch.zeros(1), torch.tensor(10)
    got = late_log_loss(torch.ones(1), torch.full((1,), torch.e), t, horizon)
    torch.testing.assert_close(got, torch.tensor([1 / 3]))


def test_a_loss_without_end_stays_finite():
    got = late_log_loss(torch.tensor([1e30]), None, torch.zeros(1), torch.tensor(10))
    torch.testing.assert_close(got, torch.tensor([1e4]).log() / 3)
