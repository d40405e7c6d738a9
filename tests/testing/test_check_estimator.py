"""Every law of estimators holds for fmeta's own, and catches one that breaks it."""

import pytest
import torch

import fmeta
from fmeta import estimators, optimizers, trees
from fmeta.estimators import Estimate, Estimator
from fmeta.random import fold_in
from fmeta.tasks import mixture, quadratic
from fmeta.testing import ESTIMATOR_LAWS, Report, check_estimator

DOUBLE = {"dtype": torch.float64}
W = {"w": torch.tensor([3.0, -1.0], **DOUBLE)}
TRUE = {"w": W["w"]}


def noisy(meta_params, seed, step):
    """Loss and gradient of ``|w|^2 / 2`` with noise of deviation 1."""
    noise = torch.randn(2, generator=fold_in(seed, step), **DOUBLE)
    w = meta_params["w"]
    return w.square().sum() / 2, {"w": w + noise}


def build(
    change=lambda estimate: estimate,
    *,
    after=lambda state: {**state, "step": state["step"] + 1},
    draw=noisy,
    first=lambda seed: {"seed": seed, "step": 0, "t": torch.zeros(2)},
):
    """A sound estimator written by hand, but for what is given."""

    def estimate(meta_params, state):
        loss, grads = draw(meta_params, state["seed"], state["step"])
        return change(Estimate(loss, grads, {})), after(state)

    return Estimator(lambda meta_params, seed: first(seed), estimate)


RULE = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.05)
PIECES = {"num_tasks": 3, "horizon": 5, "truncation": 2}
OWN = {
    "full": estimators.full(RULE, quadratic(), num_tasks=3, horizon=4),
    "truncated": estimators.truncated(RULE, quadratic(), **PIECES),
    "pes": estimators.pes(RULE, quadratic(), **PIECES),
    "pes of a mixture": estimators.pes(RULE, mixture([quadratic(), quadratic(3)]), **PIECES),
}


@pytest.mark.parametrize("name", OWN)
def test_every_law_holds_for_fmetas_own(name):
    report = check_estimator(OWN[name], RULE.init())
    assert set(report.held) == set(ESTIMATOR_LAWS) - {"unbiased"}
    assert report.not_run == {"unbiased": "no true gradient was given"}


def test_a_sound_one_passes_with_its_true_gradient():
    report = check_estimator(build(), W, true_gradient=TRUE)
    assert report == Report({name: ("meta_params",) for name in ESTIMATOR_LAWS}, {})


class Counter:
    """State outside of the state."""

    def __init__(self):
        self.n = 0

    def __call__(self, meta_params, seed, step):
        self.n += 1
        return noisy(meta_params, seed, self.n)


def in_place(state):
    state["t"].add_(1)
    return {**state, "step": state["step"] + 1}


def global_noise(meta_params, seed, step):
    return meta_params["w"].sum(), {"w": torch.randn(2, **DOUBLE)}


def fixed(meta_params, seed, step):
    return noisy(meta_params, 0, 0)


def of_the_seed_only(meta_params, seed, step):
    return noisy(meta_params, seed, 0)


def with_graph(estimate):
    return estimate._replace(loss=estimate.loss + torch.zeros((), requires_grad=True))


def unseeded(seed):
    return {"seed": int(torch.randint(99, ())), "step": 0, "t": torch.zeros(2)}


def metrics(**found):
    return build(lambda e: e._replace(metrics=found))


YES = torch.tensor([True, False])
BROKEN = [
    ("state_is_data", build(first=lambda seed: {"seed": seed, "step": 0, "t": 0.5}), "a float"),
    (
        "state_is_data",
        build(after=lambda s: {**s, "step": s["step"] + 1, "t": s["t"].double()}),
        r"state\['t'\] became float64 in estimate 0",
    ),
    (
        "state_is_data",
        build(first=lambda s: {"seed": s, "step": 0, "t": torch.zeros(2, requires_grad=True)}),
        "carries a graph",
    ),
    ("pure", build(draw=Counter()), "from equal arguments once more"),
    ("pure", build(after=in_place), r"changed its argument state\['t'\] in place"),
    ("pure", build(draw=global_noise), "estimate used torch's global generator"),
    ("seeded", build(first=unseeded), "init used torch's global generator"),
    ("seeded", build(draw=fixed), "the same with another seed"),
    ("seeded", build(draw=of_the_seed_only), "the same with the next state"),
    ("gradient_fits", build(tuple), "not an Estimate"),
    ("gradient_fits", build(lambda e: e._replace(loss=e.grads["w"])), "no scalar tensor"),
    ("gradient_fits", build(lambda e: e._replace(loss=e.loss / 0)), "the loss is inf"),
    ("gradient_fits", build(lambda e: e._replace(grads={"w": torch.ones(2)})), "became float32"),
    ("gradient_fits", build(lambda e: e._replace(grads={})), "disappeared"),
    ("gradient_fits", build(lambda e: e._replace(grads={"w": W["w"] / 0})), "is not finite"),
    ("gradient_fits", build(with_graph), "carries a graph"),
    ("metrics_named", build(lambda e: e._replace(metrics=None)), "metrics are a NoneType"),
    ("metrics_named", metrics(share=0.5), "is a float"),
    ("metrics_named", metrics(signal_to_noise=torch.ones(2)), "must be a scalar"),
    ("metrics_named", metrics(diverged=YES.float()), "a boolean for each task"),
    ("metrics_named", metrics(diverged_at=torch.zeros(2)), "without diverged"),
    ("metrics_named", metrics(diverged=YES, drawn=torch.zeros(3, 2)), "a row for each of 2"),
    (
        "metrics_named",
        metrics(diverged=YES, diverged_at=torch.zeros(2)),
        "a task that did not diverge",
    ),
]


@pytest.mark.parametrize(("law", "estimator", "message"), BROKEN)
def test_a_law_catches_what_breaks_it(law, estimator, message):
    with pytest.raises(AssertionError, match=f"law {law}: .*{message}"):
        ESTIMATOR_LAWS[law](estimator, W)
    with pytest.raises(AssertionError, match="law "):
        check_estimator(estimator, W)


def test_what_is_kept_beside_the_values_of_a_state_is_lost():
    known = {}

    def estimate(meta_params, state):
        shift = 1.0 if id(state["t"]) in known else 0.0
        loss, grads = noisy(meta_params, state["seed"], state["step"])
        t = state["t"].clone()
        known[id(t)] = t  # kept, so that no other tensor gets its id
        return Estimate(loss + shift, grads, {}), {**state, "step": state["step"] + 1, "t": t}

    estimator = Estimator(build().init, estimate)
    ESTIMATOR_LAWS["pure"](estimator, W)
    with pytest.raises(AssertionError, match=r"law resumes: .* of a state that was saved and read"):
        ESTIMATOR_LAWS["resumes"](estimator, W)


def test_a_bias_of_some_standard_errors_is_caught():
    # 16 seeds of noise with deviation 1 in two coordinates: a standard error of about 0.35.
    biased = build(lambda e: e._replace(grads={"w": e.grads["w"] + 2.0}))
    with pytest.raises(AssertionError, match=r"law unbiased: the mean of 16 estimates is .* away"):
        check_estimator(biased, W, true_gradient=TRUE)
    check_estimator(biased, W, true_gradient=TRUE, max_errors=20)


def test_estimates_of_a_whole_training_are_taken_together():
    # Each is off by itself, by turns in the one and the other direction.
    def draw(meta_params, seed, step):
        loss, grads = noisy(meta_params, seed, step)
        return loss, trees.map(lambda g: g + 5.0 * (-1) ** step, grads)

    with pytest.raises(AssertionError, match="law unbiased"):
        check_estimator(build(draw=draw), W, true_gradient=TRUE)
    check_estimator(build(draw=draw), W, true_gradient=TRUE, num_estimates=2)


def test_an_exact_estimator_may_differ_by_rounding_only():
    exact = lambda shift: build(
        draw=lambda meta, seed, step: (meta["w"].sum(), {"w": meta["w"] + shift})
    )
    laws = {"laws": ["unbiased"], "true_gradient": TRUE}
    check_estimator(exact(1e-9), W, **laws)
    with pytest.raises(AssertionError, match="its standard error is 0"):
        check_estimator(exact(1e-3), W, **laws)


def test_what_an_estimator_raises_is_passed_on_with_the_law():
    def wrong(meta_params, seed, step):
        raise KeyError("missing")

    with pytest.raises(AssertionError, match="law pure: the estimator raised KeyError: 'missing'"):
        ESTIMATOR_LAWS["pure"](build(draw=wrong), W)


def test_laws_are_chosen_by_name():
    report = check_estimator(build(draw=fixed), W, exclude=["seeded", "resumes"])
    assert report.not_run["seeded"] == "excluded"
    assert check_estimator(build(), W, laws=["pure"]).not_run["seeded"] == "not among `laws`"
    with pytest.raises(ValueError, match="there is no law 'fast'"):
        check_estimator(build(), W, laws=["fast"])


@pytest.mark.parametrize("options", [{"num_estimates": 0}, {"num_seeds": 1}])
def test_numbers_without_a_standard_error_are_refused(options):
    with pytest.raises(ValueError, match="num_estimates must be at least 1 and num_seeds"):
        check_estimator(build(), W, **options)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match="takes an Estimator, got a function"):
        check_estimator(noisy, W)
