"""Evolution strategies equal an independent program's, given the same perturbations."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fmeta
from fmeta import estimators
from fmeta.estimators import meta_losses
from fmeta.estimators._noise import Noise
from fmeta.estimators._perturbations import Perturbations, weighted_sums
from fmeta.tasks import TaskFamily

DATA = {
    k: torch.from_numpy(np.asarray(v))
    for k, v in np.load(Path(__file__).with_name("es.npz")).items()
}
K, PAIRS, SIGMA = int(DATA["K"]), int(DATA["N_pairs"]), float(DATA["sigma"])
HORIZON = int(DATA["T"])


def momentum_sgd():
    """``v = sigmoid(theta[3]) v + g; x -= exp(theta[:3]) v``."""

    def step(theta, x, g, v):
        v = torch.sigmoid(theta[3]) * v + g
        return x - torch.exp(theta[:3]) * v, v

    return fmeta.optimizer_from_step(
        lambda generator: DATA["theta0"], lambda theta, x: torch.zeros_like(x), step
    )


def family():
    def loss(data, config, x, batch):
        d = x - data["c"]
        return 0.5 * d @ data["H"] @ d

    return TaskFamily(
        {"H": DATA["H"], "c": DATA["c"]},
        lambda generator: {},
        lambda config, generator: DATA["x0"],
        lambda config, generator, steps, split="train": torch.zeros(steps),
        loss,
    )


def close(got, want, tol=1e-10):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def estimator(**options):
    return estimators.pes(
        momentum_sgd(),
        family(),
        num_tasks=PAIRS,
        horizon=HORIZON,
        truncation=K,
        std=SIGMA,
        stagger=False,
        perturb=lambda meta, step, i: DATA["pes_eps"][step % 4, i],
        **options,
    )


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("kind", ["fixed", "sgd"])
def test_persistent_es(kind, trace):
    theta, est = DATA["theta0"], estimator(trace=trace)
    state = est.init(theta, 0)
    for w in range(HORIZON // K):
        close(theta, DATA[f"pes_{kind}_theta"][w])
        found, state = est.estimate(theta, state)
        if kind == "fixed":
            close(found.grads, DATA["pes_fixed_grad_mean"][w])
        close(found.grads * K, DATA[f"pes_{kind}_grad_sum"][w])
        close(found.metrics["losses"][..., 0].T, DATA[f"pes_{kind}_loss_pos"][w])
        close(found.metrics["losses"][..., 1].T, DATA[f"pes_{kind}_loss_neg"][w])
        close(state.xi, DATA[f"pes_{kind}_xi"][w])
        if kind == "sgd":
            theta = theta - 0.02 * K * found.grads
    close(theta, DATA[f"pes_{kind}_theta_final"])
    close(state.params[:, 0], DATA[f"pes_{kind}_x_pos_final"])
    close(state.params[:, 1], DATA[f"pes_{kind}_x_neg_final"])


@pytest.mark.parametrize("kind", ["fixed", "sgd"])
@pytest.mark.parametrize(
    ("name", "build", "options"),
    [
        ("tes", estimators.es, {"stagger": False}),
        ("nres", estimators.nres, {"stagger": False}),
        ("nres", estimators.es_single, {}),  # the same while all trainings begin together
    ],
    ids=["es", "nres", "es_single"],
)
def test_other_weights_and_perturbations(name, build, options, kind):
    theta = DATA["theta0"]
    est = build(
        momentum_sgd(),
        family(),
        num_tasks=PAIRS,
        horizon=HORIZON,
        truncation=K,
        std=SIGMA,
        perturb=lambda meta, step, i: DATA["pes_eps"][step, i],
        **options,
    )
    state = est.init(theta, 0)
    for w in range(HORIZON // K):
        close(theta, DATA[f"{name}_{kind}_theta"][w])
        found, state = est.estimate(theta, state)
        close(found.grads * K, DATA[f"{name}_{kind}_grad_sum"][w])
        close(found.metrics["losses"][..., 0].T, DATA[f"{name}_{kind}_loss_pos"][w])
        close(found.metrics["losses"][..., 1].T, DATA[f"{name}_{kind}_loss_neg"][w])
        if kind == "sgd":
            theta = theta - 0.02 * K * found.grads
    close(theta, DATA[f"{name}_{kind}_theta_final"])
    close(state.params[:, 0], DATA[f"{name}_{kind}_x_pos_final"])
    close(state.params[:, 1], DATA[f"{name}_{kind}_x_neg_final"])


WHOLE = {
    "mean": meta_losses.mean(),
    "sum": meta_losses.sum(),
    "last": meta_losses.final(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_evolution_strategies_on_whole_trainings(name):
    est = estimators.es(
        momentum_sgd(),
        family(),
        num_tasks=PAIRS,
        horizon=HORIZON,
        truncation=HORIZON,
        std=SIGMA,
        stagger=False,
        meta_loss=WHOLE[name],
        perturb=lambda meta, step, i: DATA["fulles_eps"][i],
    )
    found, _ = est.estimate(DATA["theta0"], est.init(DATA["theta0"], 0))
    close(found.grads, DATA[f"fulles_grad_{name}"])
    close(found.metrics["losses"][..., 0].T, DATA["fulles_loss_pos"])


@pytest.mark.parametrize("name", WHOLE)
def test_the_true_gradient(name):
    """Of a program's central differences, at the same meta-losses."""
    est = estimators.full(
        momentum_sgd(), family(), num_tasks=1, horizon=HORIZON, meta_loss=WHOLE[name]
    )
    found, _ = est.estimate(DATA["theta0"], est.init(DATA["theta0"], 0))
    close(found.grads, DATA[f"true_grad_{name}"], 1e-7)
    close(found.metrics["losses"][0], DATA["loss_curve"])


def test_a_training_that_is_over_begins_anew_without_what_it_has_seen():
    est, theta = estimator(), DATA["theta0"]
    state = est.init(theta, 0)
    for _ in range(HORIZON // K):
        first, state = est.estimate(theta, state)
    again, state = est.estimate(theta, state)  # the same perturbations as in truncation 0
    close(again.grads, DATA["pes_fixed_grad_mean"][0])
    close(state.xi, DATA["pes_fixed_xi"][0])
    assert not torch.equal(first.grads, again.grads)


def test_resets_within_a_truncation():
    arrays = [DATA[f"greset_{n}"] for n in ("loss_pos", "loss_neg", "is_done", "mask")]
    pos, neg, done, mask = (x.T for x in arrays)
    eps, accumulator = DATA["greset_eps"], DATA["greset_accumulator"]
    # Their loss at the step that ends a training counts as new, ours begins the new one. Rows of
    # the table: the trainings that go on, then those that begin.
    over = done.bool().cumsum(0) > 0
    row = torch.arange(PAIRS) + PAIRS * over
    xi = torch.cat([accumulator + eps, eps])
    found = Perturbations(
        row, row.tolist(), torch.arange(PAIRS).repeat(2), [], torch.cat([eps, eps]), xi
    )
    relative = (pos - neg) / 2 * mask / mask.sum(0) * len(mask)
    parts = weighted_sums(relative, found, DATA["theta0"], Noise(SIGMA))
    close(parts.mean(0), DATA["greset_grad"])
    close(xi[row[-1]], DATA["greset_new_accumulator"])
