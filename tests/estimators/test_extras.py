"""A family's extras reach rules that need them, in every estimator and in evaluation."""

import pytest
import torch
from torch.nn import functional as F

import fmeta
from fmeta import evaluate, trees
from fmeta.estimators import full, pes, truncated
from fmeta.optimizer import Optimizer
from fmeta.tasks import (
    augmented,
    digits,
    extras_of_task,
    loss_of_task,
    mixture,
    quadratic,
    sample_task,
    sinusoid,
)

DIGITS = digits((6,), batch_size=16)


def delta_rule(reads_grads=False):
    """For the last layer, ``lr * error x input``: minus the gradient of the cross-entropy."""

    def update(th, p, g, h, *, loss=None, extras=None):
        layers = extras["activations"]
        delta = {k: torch.zeros_like(v) for k, v in p.items()}
        for path, at in layers[-1].items():
            delta[path] = th["lr"] * (at["inputs"] * at["error"]).mean(0)
        return delta, {"t": h["t"] + 1}

    return Optimizer(
        lambda generator=None: {"lr": torch.tensor(0.3)},
        lambda th, p, **k: {"t": torch.zeros(())},
        update,
        frozenset({"activations"}),
        reads_grads=reads_grads,
    )


def losses_by_gradient(th, task, family=DIGITS):
    def update(th, p, g, h, *, loss=None, extras=None):
        return {k: -th["lr"] * g[k] if k in ("w1", "b1") else 0 * g[k] for k in p}, h

    rule = Optimizer(lambda generator=None: th, lambda th, p, **k: (), update)
    return fmeta.unroll(
        rule, loss_of_task(family), th, task.model_params, task.batches, loss_args=(task.config,)
    ).losses


def close(got, want, tol=1e-5):
    for a, b in zip(trees.leaves(got), trees.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


FAMILIES = {
    "digits": DIGITS,
    "online": digits((6, 5), "tanh", batch_size=16, online=True),
    "no hidden layer": digits((), batch_size=16),
    "autoencoder": digits((6,), batch_size=16, model="autoencoder"),
    "sinusoid": sinusoid(5, (6,)),
    "permuted labels": augmented(DIGITS, permute_labels=True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_make_the_gradient_of_the_last_layer(name):
    # For cross-entropy and squared error, -error x input is the gradient (up to 2 / outputs).
    family = FAMILIES[name]
    task = sample_task(family, 1, 3)
    batch = trees.map(lambda x: x[0], task.batches)
    layers = family.extras(family.data, task.config, task.model_params, batch)["activations"]
    grads = torch.func.grad(loss_of_task(family))(task.model_params, batch, task.config)
    assert len(layers) == len(grads) // 2
    for i, layer in enumerate(layers):
        assert list(layer) == [f"w{i}", f"b{i}"]
        assert ("error" in layer[f"w{i}"]) == (i == len(layers) - 1)
        for path, at in layer.items():
            shape = torch.broadcast_shapes(at["inputs"].shape, at["outputs"].shape)
            assert shape[1:] == grads[path].shape
    scale = {"autoencoder": 2 / 64, "sinusoid": 2.0}.get(name, 1.0)
    for path, at in layers[-1].items():
        close(-scale * (at["inputs"] * at["error"]).mean(0), grads[path])


def test_activations_are_those_of_the_network():
    task = sample_task(DIGITS, 1, 3)
    p, rows = task.model_params, task.batches[0]
    layers = DIGITS.extras(DIGITS.data, {}, p, rows)["activations"]
    x = DIGITS.data["x"][rows]
    z = x @ p["w0"] + p["b0"]
    out = F.relu(z) @ p["w1"] + p["b1"]
    want = F.one_hot(DIGITS.data["y"][rows], 10) - out.softmax(-1)
    close(layers[0]["w0"]["inputs"].squeeze(-1), x)
    close(layers[0]["w0"]["outputs"].squeeze(1), z)
    close(layers[1]["w1"]["inputs"].squeeze(-1), F.relu(z))
    close(layers[1]["b1"]["error"], want)
    assert bool((layers[1]["b1"]["inputs"] == 1).all())


def test_augmentation_does_not_change_what_the_network_computes():
    wild = augmented(DIGITS, rescale=0.5, loss_scale=1.0, gradient_noise=0.1)
    task = sample_task(wild, 1, 3)
    batch = trees.map(lambda x: x[0], task.batches)
    own = trees.map(torch.mul, task.model_params, task.config["scales"])
    close(
        wild.extras(wild.data, task.config, task.model_params, batch),
        DIGITS.extras(DIGITS.data, {}, own, batch["inner"]),
    )


@pytest.mark.parametrize("reads_grads", [False, True])
@pytest.mark.parametrize("options", [{}, {"checkpoint": "sqrt"}, {"chunk_size": 1}], ids=str)
def test_full_differentiates_through_them(reads_grads, options):
    th = delta_rule().init()
    estimator = full(delta_rule(reads_grads), DIGITS, num_tasks=2, horizon=5, **options)
    found, _ = estimator.estimate(th, estimator.init(th, 0))
    tasks = [sample_task(DIGITS, 5, 0, 0, i) for i in range(2)]
    mean = lambda th: torch.stack([losses_by_gradient(th, task).mean() for task in tasks]).mean()
    grads, loss = torch.func.grad_and_value(mean)(th)
    close(found.loss, loss)
    close(found.grads, grads, 1e-4)


MODES = {
    "truncated": (truncated, {}),
    "truncated, checkpoint": (truncated, {"checkpoint": "sqrt"}),
    "truncated, inputs": (truncated, {"first_order": "inputs"}),
    "pes, not recorded": (pes, {"trace": False}),
    "pes, recorded": (pes, {"trace": True}),
    "pes, chunks": (pes, {"chunk_size": 1}),
}


@pytest.mark.parametrize("mode", MODES)
def test_trainings_in_pieces_get_them(mode):
    build, options = MODES[mode]
    th = delta_rule().init()
    no_noise = {"perturb": lambda meta, step, i: trees.map(torch.zeros_like, meta)}
    options = {**options, **(no_noise if build is pes else {})}
    estimator = build(
        delta_rule(), DIGITS, num_tasks=2, horizon=6, truncation=3, stagger=False, **options
    )
    state, found = estimator.init(th, 0), []
    for _ in range(2):
        estimate, state = estimator.estimate(th, state)
        found.append(estimate.metrics["losses"][:, :, 0])
    for i in range(2):
        task = sample_task(DIGITS, 3, 0, 0, i, 1)
        close(found[0][:, i], losses_by_gradient(th, task))
    assert found[1].isfinite().all()
    assert bool((state.hidden["t"] == 6).all())  # the trainings went on


def test_a_mixture_gives_each_family_its_own():
    both = mixture([DIGITS, digits((), batch_size=16)])
    th = delta_rule().init()
    estimator = full(delta_rule(), both, num_tasks=2, horizon=4)
    found, _ = estimator.estimate(th, estimator.init(th, 0))
    assert found.grads["lr"].isfinite()
    assert not found.metrics["diverged"].any()


def test_comparison_and_evaluation_give_them():
    th = {"lr": torch.tensor(0.3)}
    contenders = {"local": (delta_rule(), th), "sgd": (fmeta.optimizers.sgd(0.3), {})}
    curves = evaluate.compare(DIGITS, contenders, num_steps=4, num_seeds=2, seed=1)
    for i in range(2):
        want = losses_by_gradient(th, sample_task(DIGITS, 4, 1, i))
        close(curves["local"].train[i], want)
    found = evaluate.run(
        DIGITS, contenders, num_steps=4, num_seeds=2, seed=1, baselines=(), final_batches=2
    )
    close(found.outcomes["local"].curves.train.float(), curves["local"].train)


def test_they_are_not_computed_for_rules_that_need_none():
    def never(*arguments):
        raise AssertionError("extras were computed")

    family = DIGITS._replace(extras=never)
    rule = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.1)
    assert extras_of_task(family, rule) is None
    for build, options in ((full, {}), (truncated, {"truncation": 2}), (pes, {"truncation": 2})):
        estimator = build(rule, family, num_tasks=1, horizon=2, **options)
        estimator.estimate(rule.init(), estimator.init(rule.init(), 0))


BUILD = {
    "full": lambda family: full(delta_rule(), family, num_tasks=1, horizon=2),
    "truncated": lambda family: truncated(
        delta_rule(), family, num_tasks=1, horizon=2, truncation=1
    ),
    "pes": lambda family: pes(delta_rule(), family, num_tasks=1, horizon=2, truncation=1),
    "compare": lambda family: evaluate.compare(
        family, {"a": (delta_rule(), {})}, num_steps=2, num_seeds=2, seed=0
    ),
    "run": lambda family: evaluate.run(
        family, {"a": (delta_rule(), {})}, num_steps=2, num_seeds=2, seed=0
    ),
}


@pytest.mark.parametrize("how", BUILD)
@pytest.mark.parametrize("kind", ["none", "others"])
def test_a_family_without_them_is_refused_before_any_training(how, kind, monkeypatch):
    monkeypatch.setattr(evaluate._run, "draw", None)  # nothing may be drawn or tuned before
    family = quadratic(2)
    words = "needs activations, but the family has no `extras` .*fmeta.tasks.digits"
    if kind == "others":
        family = family._replace(extras=lambda *_: {"noise": torch.zeros(())})
        words = r"needs activations, but the family's `extras` give noise: .*'activations': "
    with pytest.raises(ValueError, match=words):
        BUILD[how](family)


def test_of_a_mixture_every_family_must_give_them():
    both = mixture([DIGITS, quadratic(2)])
    with pytest.raises(ValueError, match="the family has no `extras`"):
        full(delta_rule(), both, num_tasks=2, horizon=2)
