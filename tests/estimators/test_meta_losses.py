"""Meta-losses: one name for estimators of pieces and of whole trainings, and equal in both."""

import math

import pytest
import torch

import fmeta
from fmeta import estimators, optimizers, trees
from fmeta.estimators import meta_losses
from fmeta.tasks import TaskFamily

DOUBLE = {"dtype": torch.float64}
T, TASKS = 4, 3


def family(**options):
    """``scale |w - b|^2`` with batches of zeros, so that all draws but ``scale`` are the same."""
    return TaskFamily(
        None,
        lambda generator: {"scale": torch.tensor(2.0, **DOUBLE)},
        lambda config, generator: {"w": torch.ones(2, **DOUBLE)},
        lambda config, generator, steps, split="train": torch.full(
            (steps,), 0.5 if split == "validation" else 0.0, **DOUBLE
        ),
        lambda data, config, p, b: config["scale"] * (p["w"] - b).square().sum(),
    )


RULE = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.05)
META = trees.cast(RULE.init(), torch.float64)
CURVE = (4.0, 3.0, 2.0)
LOSSES = {
    "mean": meta_losses.mean(),
    "sum": meta_losses.sum(),
    "final": meta_losses.final(),
    "weighted": meta_losses.weighted(lambda t, horizon: (t + 1.0) / horizon),
    "weighted by a table": meta_losses.weighted([0.0, 1.0, 2.0]),
    "training": meta_losses.training(),
    "log": meta_losses.log_ratio(),
    "log, by t": meta_losses.log_ratio(torch.tensor(CURVE)),
    "log, by task": meta_losses.log_ratio(lambda config: config["scale"] * 3),
    "final log": meta_losses.final(of=meta_losses.log_ratio(2.0, of=meta_losses.training())),
    "own": meta_losses.sum(of=lambda losses, evals, t, horizon: losses.square() * t),
}


def closed_form(name, losses, evals):
    """Each of them in plain words, of lists of Python numbers."""
    seen = losses if evals is None else evals
    last = len(losses) - 1
    return {
        "mean": sum(seen) / T,
        "sum": sum(seen),
        "final": seen[-1],
        "weighted": sum((t + 1) / T * x for t, x in enumerate(seen)) / T,
        "weighted by a table": sum(min(t, 2) * x for t, x in enumerate(seen)) / T,
        "training": sum(losses) / T,
        "log": sum(math.log(x) for x in seen) / T,
        "log, by t": sum(math.log(x / CURVE[min(t, 2)]) for t, x in enumerate(seen)) / T,
        "log, by task": sum(math.log(x / 6) for x in seen) / T,
        "final log": math.log(losses[last] / 2),
        "own": sum(x**2 * t for t, x in enumerate(losses)),
    }[name]


def one(build, meta_loss, eval_split, **options):
    estimator = build(
        RULE,
        family(),
        num_tasks=TASKS,
        horizon=T,
        meta_loss=meta_loss,
        eval_split=eval_split,
        **options,
    )
    return estimator.estimate(META, estimator.init(META, 0))[0]


@pytest.mark.parametrize("eval_split", [None, "validation"])
@pytest.mark.parametrize("name", LOSSES)
def test_whole_trainings_and_pieces_have_the_same_loss_and_gradient(name, eval_split):
    whole = one(estimators.full, LOSSES[name], eval_split)
    pieces = one(estimators.truncated, LOSSES[name], eval_split, truncation=T, stagger=False)
    # w is the same in both coordinates: L = 2 * 2 w^2, w <- (1 - 4 lr) w.
    w, losses, evals = 1.0, [], []
    for _ in range(T):
        losses.append(4 * w**2)
        w *= 1 - 4 * 0.05
        evals.append(4 * (w - 0.5) ** 2)
    want = closed_form(name, losses, evals if eval_split else None)
    for found in (whole, pieces):
        assert float(found.loss) == pytest.approx(want, rel=1e-6)  # lr is a float32 number
    torch.testing.assert_close(whole.grads, pieces.grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["sum", "final", "log, by task"])
def test_perturbed_trainings_take_them(name):
    found = one(
        estimators.pes,
        LOSSES[name],
        None,
        truncation=T,
        stagger=False,
        perturb=lambda meta, step, i: trees.map(lambda x: torch.full_like(x, 1e-4), meta),
    )
    want = one(estimators.full, LOSSES[name], None)
    assert float(found.loss) == pytest.approx(float(want.loss), rel=1e-6)
    # One direction and one meta-parameter: eps (L+ - L-) / (2 std^2) with eps^2 / std^2 = 1e-4.
    slope = found.grads["lr"] * 0.01**2 / 1e-4**2
    assert float(slope) == pytest.approx(float(want.grads["lr"]), rel=1e-5)


def test_the_config_is_that_of_the_task_at_the_step():
    drawn = family()._replace(
        sample=lambda generator: {"scale": 1 + torch.rand((), generator=generator, **DOUBLE)}
    )
    own = meta_losses.log_ratio(lambda config: config["scale"], of=meta_losses.training())
    # horizon 2 within a truncation of 5: three tasks in each place.
    estimator = estimators.truncated(
        RULE, drawn, num_tasks=2, horizon=2, truncation=5, stagger=False, meta_loss=own
    )
    found, _ = estimator.estimate(META, estimator.init(META, 0))
    lr = float(META["lr"].exp())
    total = 0.0
    for i in range(2):
        for start, steps in ((1, 2), (2, 2), (3, 1)):
            scale = float(fmeta.tasks.sample_task(drawn, 1, 0, 0, i, start).config["scale"])
            w = 1.0
            for _ in range(steps):
                total += math.log(2 * w**2)  # scale * 2 w^2 / scale
                w *= 1 - 2 * lr * scale
    assert float(found.loss) == pytest.approx(total / 10)


LAST = lambda losses, evals, t, horizon: losses[-1]
MEANS = {
    "of all": lambda losses: losses.mean(),
    "over copies": lambda losses: losses.mean(-1, keepdim=True),
    "over tasks": lambda losses: losses.mean(1, keepdim=True),
}
PIECES = {
    "es": {"truncation": 2, "std": 0.1},
    "es_single": {"truncation": 2, "std": 0.1},
    "pes": {"truncation": 2, "std": 0.1},
    "nres": {"truncation": 2, "std": 0.1},
    "truncated": {"truncation": 2},
    "score_function": {"std": 0.1, "num_rollouts": 2},
}


# `truncated` has one copy, so that a mean over copies is none.
@pytest.mark.parametrize(
    ("name", "of"),
    [(n, of) for n in PIECES for of in MEANS if (n, of) != ("truncated", "over copies")],
)
def test_a_mean_taken_too_early_is_refused(name, of):
    """Copies that all get their mean have a gradient of zero."""
    build = getattr(estimators, name)
    mean = lambda losses, evals, t, horizon: MEANS[of](losses)
    estimator = build(RULE, family(), num_tasks=TASKS, horizon=T, meta_loss=mean, **PIECES[name])
    with pytest.raises(ValueError, match=r"like losses, got \(.*do not take the mean in it"):
        estimator.estimate(META, estimator.init(META, 0))


@pytest.mark.parametrize("name", [name for name in PIECES if name != "score_function"])
def test_one_value_for_all_steps_is_that_of_each(name):
    """Task and copy are told apart, so that nothing is lost."""
    forms = {
        "without steps": LAST,
        "of one step": lambda losses, evals, t, horizon: losses[-1:],
        "of each": lambda losses, evals, t, horizon: losses[-1:].expand_as(losses),
    }
    found = {
        form: one(getattr(estimators, name), of, None, **PIECES[name]) for form, of in forms.items()
    }
    want = found.pop("of each")
    assert want.grads["lr"] != 0
    for got in found.values():
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.grads["lr"], want.grads["lr"])


def test_steps_and_tasks_that_look_alike_are_not_mistaken():
    """With as many steps as tasks, a mean over tasks is shaped like a value of each."""
    options = {"truncation": TASKS, "std": 0.1}
    over_tasks = lambda losses, evals, t, horizon: losses.mean(1)
    for of in (over_tasks, LAST):
        with pytest.raises(ValueError, match=r"keep their dimension, as losses\[-1:\] does"):
            one(estimators.pes, of, None, **options)


def test_credit_wants_the_step_of_a_value():
    options = {"num_rollouts": 2, "std": 0.1}
    with pytest.raises(ValueError, match=r"a value for each step.* got \(3, 2\)"):
        one(estimators.score_function, LAST, None, **options)


def test_tables_of_numbers_are_as_exact_as_the_losses():
    losses, t, horizon = torch.ones(1, **DOUBLE), torch.arange(1), torch.tensor(1)
    assert float(meta_losses.weighted([0.1])(losses, None, t, horizon)) == 0.1
    ratio = meta_losses.log_ratio([0.1])(losses, None, t, horizon)
    assert float(ratio) == pytest.approx(math.log(10), abs=1e-15)


def test_a_loss_of_zero_has_a_finite_logarithm():
    t = torch.arange(2)
    got = meta_losses.log_ratio(1.0, floor=1e-6)(torch.tensor([0.0, 1.0]), None, t, torch.tensor(2))
    torch.testing.assert_close(got, torch.tensor([math.log(1e-6), 0.0]))


def test_validation_without_evaluation_is_an_error_that_names_the_cure():
    for build, options in ((estimators.full, {}), (estimators.truncated, {"truncation": 2})):
        with pytest.raises(ValueError, match='give the estimator eval_split="validation"'):
            one(build, meta_losses.validation(), None, **options)
        with_split = one(build, meta_losses.validation(), "validation", **options)
        assert torch.equal(with_split.loss, one(build, None, "validation", **options).loss)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: meta_losses.log_ratio(0.0), ValueError, "baseline must be positive, got 0"),
        (
            lambda: meta_losses.log_ratio([1.0, -1.0]),
            ValueError,
            "baseline must be positive, got -1",
        ),
        (lambda: meta_losses.log_ratio([]), ValueError, r"baseline by step must be one number"),
        (lambda: meta_losses.weighted(torch.ones(2, 2)), ValueError, r"of shape \(T,\), got"),
        (lambda: meta_losses.mean()(torch.ones(3)), TypeError, "takes a Run, or losses"),
    ],
    ids=["zero", "negative by step", "no numbers", "matrix", "losses alone"],
)
def test_what_is_no_meta_loss_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
