"""The baseline of the sinusoid figure: joint training, then gradient descent at a tuned rate."""

import torch
from torch.nn import functional as F

from fmeta import fewshot, optimizers
from fmeta.fewshot._pretrained import RATES, fine_tuned, pretrained
from fmeta.random import fold_in
from fmeta.tasks._mlp import mlp

SOURCE = fewshot.sinusoid(shots=6, queries=4)
NETWORK = mlp((1, 8, 1), "relu")
START = NETWORK.init(fold_in(1))


def train(num_steps):
    return pretrained(
        NETWORK,
        SOURCE,
        loss="mse",
        outer=optimizers.sgd(0.05),
        num_tasks=5,
        num_steps=num_steps,
        seed=3,
        start=START,
    )["model_params"]


def test_it_is_descent_of_the_mean_loss_over_all_examples_of_all_tasks():
    params = {k: v.double() for k, v in START.items()}
    for step in range(3):
        support, query, _ = fewshot.draw(SOURCE, [(3, step, i) for i in range(5)])
        x = torch.cat([support.x, query.x], 1).flatten(0, 1).double()
        y = torch.cat([support.y, query.y], 1).flatten(0, 1).double()
        grads = torch.func.grad(lambda p, x=x, y=y: F.mse_loss(NETWORK.apply(p, x), y))(params)
        params = {k: v - 0.05 * grads[k] for k, v in params.items()}
    for name, got in train(3).items():
        torch.testing.assert_close(got.double(), params[name], rtol=1e-5, atol=1e-6)


def test_the_rate_is_the_best_one_for_the_number_of_steps():
    meta_params = {"model_params": train(3), "opt_params": {}}
    options = {"num_episodes": 20, "seed": 5, "loss": "mse", "split": "validation"}
    chosen = {}
    for steps in (1, 20):
        learner, chosen[steps] = fine_tuned(
            NETWORK, meta_params, SOURCE, num_steps=steps, **options
        )
        best = fewshot.evaluate(learner, meta_params, SOURCE, **options).loss()[0]
        for rate in RATES:
            other = fewshot.maml(NETWORK, lr=rate, num_steps=steps, loss="mse")
            scores = fewshot.evaluate(other, meta_params, SOURCE, **options)
            assert not scores.loss()[0] < best
    assert chosen[20] <= chosen[1]
    assert chosen[1] > 0
