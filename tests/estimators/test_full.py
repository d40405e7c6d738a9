"""The full estimator is the gradient of unroll, averaged over tasks that integers fix."""

import pytest
import torch
from torch.func import grad

import fmeta
from fmeta import estimators, optimizers, trees
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily, loss_of_task, mixture, sample_task

DOUBLE = {"dtype": torch.float64}
T = 4


def quadratics():
    """Tasks with a curvature of their own, noisy targets, and another split."""

    def batches(config, generator, steps, split="train"):
        noise = torch.randn(steps, 3, generator=generator, **DOUBLE)
        return noise + (1.0 if split == "validation" else 0.0)

    return TaskFamily(
        torch.tensor([1.0, 2.0, 3.0], **DOUBLE),
        lambda generator: {"k": 1 + torch.rand((), generator=generator, **DOUBLE)},
        lambda config, generator: {"w": torch.randn(3, generator=generator, **DOUBLE)},
        batches,
        lambda data, config, p, b: config["k"] * (data * (p["w"] - b).square()).sum(),
    )


FAMILY = quadratics()
RULE = fmeta.learn(optimizers.sgd, {"lr": "log", "momentum": "logit"}, lr=0.02, momentum=0.5)
META = trees.cast(RULE.init(), torch.float64)


def by_hand(opt_params, i, *, start=None, seed=3, step=0, split=None, score=None, rule=RULE):
    """One task: sampled and unrolled without the estimator."""
    task = sample_task(FAMILY, T, seed, step, i)
    shown = None if split is None else sample_task(FAMILY, T, seed, step, i, split=split).batches
    run = fmeta.unroll(
        rule,
        loss_of_task(FAMILY),
        opt_params,
        task.model_params if start is None else start,
        task.batches,
        loss_args=(task.config,),
        eval_batches=shown,
    )
    if score is not None:
        return score(run)
    return (run.losses if split is None else run.eval_losses).mean()


def close(got, want, tol=1e-10):
    trees.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tol, atol=tol), got, want)


def estimate(meta=META, *, seed=3, skip=0, **options):
    arguments = {"num_tasks": 3, "horizon": T, **options}
    estimator = estimators.full(arguments.pop("rule", RULE), FAMILY, **arguments)
    state = estimator.init(meta, seed)
    for _ in range(skip):
        _, state = estimator.estimate(meta, state)
    return estimator.estimate(meta, state)


def mean_of(fn):
    return lambda meta: torch.stack([fn(meta, i) for i in range(3)]).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpoint": "sqrt"},
        {"checkpoint": 2},
        {"mixed_mode": True},
        {"recompute": "both"},
        {"recompute": "rule", "mixed_mode": True},
    ],
    ids=str,
)
def test_it_is_the_gradient_of_unroll(options):
    got, _ = estimate(**options)
    want = mean_of(by_hand)
    close(got.loss, want(META))
    close(got.grads, grad(want)(META))
    assert got.metrics["losses"].shape == (3, T)


def test_first_order_reaches_unroll():
    rule = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.02)
    meta = trees.cast(rule.init(), torch.float64)
    exact, first = (estimate(meta, rule=rule, first_order=o)[0] for o in (False, True))
    close(exact.loss, first.loss)
    assert (exact.grads["lr"] - first.grads["lr"]).abs() > 1e-6


def test_an_eval_split_is_what_counts():
    got, _ = estimate(eval_split="validation")
    want = mean_of(lambda th, i: by_hand(th, i, split="validation"))
    close(got.loss, want(META))
    close(got.grads, grad(want)(META))


def test_a_meta_loss_of_ones_own():
    score = lambda run: run.losses[-1] + run.params["w"].square().sum()
    got, _ = estimate(meta_loss=score)
    want = mean_of(lambda th, i: by_hand(th, i, score=score))
    close(got.grads, grad(want)(META))


def test_a_meta_loss_that_is_no_scalar_is_named():
    with pytest.raises(ValueError, match=r"meta_loss must return a floating scalar.*\(.*,\)"):
        estimate(meta_loss=lambda run: run.losses)


def test_tasks_do_not_depend_on_how_they_are_grouped():
    losses = {n: estimate(num_tasks=n)[0].metrics["losses"] for n in (1, 2, 5)}
    torch.testing.assert_close(losses[5][:2], losses[2], rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[5][:1], losses[1], rtol=1e-12, atol=0)


def test_an_estimate_is_a_function_of_seed_and_step():
    one, two = estimate(skip=2), estimate(skip=2)
    assert torch.equal(one[0].loss, two[0].loss)
    assert all(torch.equal(one[0].grads[k], two[0].grads[k]) for k in META)
    assert one[1] == two[1]
    close(one[0].grads, grad(mean_of(lambda th, i: by_hand(th, i, step=2)))(META))
    assert not torch.equal(one[0].loss, estimate(skip=1)[0].loss)
    assert not torch.equal(one[0].loss, estimate(skip=2, seed=4)[0].loss)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    estimate()
    assert torch.equal(before, torch.get_rng_state())


def test_the_state_is_integers():
    assert tuple(estimate(skip=1)[1]) == (3, 2)


START = {"w": torch.randn(3, generator=fold_in(9), **DOUBLE)}


def test_bind_for_the_initialisation():
    got, _ = estimate(START, rule=optimizers.sgd(0.02), bind=lambda meta, config: ({}, meta))
    want = mean_of(lambda w, i: by_hand({}, i, start=w, rule=optimizers.sgd(0.02)))
    close(got.grads, grad(want)(START))


def test_bind_for_both():
    meta = {"rule": META, "start": START}
    got, _ = estimate(meta, bind=lambda meta, config: (meta["rule"], meta["start"]))
    want = mean_of(lambda m, i: by_hand(m["rule"], i, start=m["start"]))
    close(got.grads, grad(want)(meta))


def test_bind_sees_the_config():
    bind = lambda meta, config: ({"lr": meta["lr"] - config["k"].log()}, None)
    rule = fmeta.learn(optimizers.sgd, {"lr": "log"})
    meta = {"lr": torch.tensor(-3.0, **DOUBLE)}
    got, _ = estimate(meta, rule=rule, bind=bind)

    def want(meta, i):
        config = sample_task(FAMILY, T, 3, 0, i).config
        return by_hand(bind(meta, config)[0], i, rule=rule)

    close(got.grads, grad(mean_of(want))(meta))


def test_nothing_outside_is_recorded():
    leaf = trees.map(lambda x: x.clone().requires_grad_(), META)
    got, _ = estimate(leaf)
    assert not any(g.requires_grad for g in (*trees.leaves(got.grads), got.loss))
    close(got.grads, estimate()[0].grads)


def test_meta_training_by_hand_learns():
    estimator = estimators.full(RULE, FAMILY, num_tasks=3, horizon=T)
    outer, meta = optimizers.adam(0.1), META
    hidden, state = outer.init_hidden({}, meta), estimator.init(meta, 0)
    for _ in range(30):
        got, state = estimator.estimate(meta, state)
        meta, hidden = outer.step({}, meta, got.grads, hidden)
    judge = lambda th: estimate(th, seed=77, num_tasks=50)[0].loss  # tasks that it did not see
    assert judge(meta) < judge(META) - 0.1


@pytest.mark.parametrize("name", ["num_tasks", "horizon"])
def test_numbers_below_1_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        estimate(**{name: 0})


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_chunks_of_tasks_change_nothing(size):
    want, got = estimate()[0], estimate(chunk_size=size)[0]
    close(got, want)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        estimate(chunk_size=0)


@pytest.mark.parametrize("data", [True, False])
def test_tasks_go_where_the_data_or_else_the_meta_parameters_are(data):
    family = FAMILY._replace(data=FAMILY.data.to("meta"))
    if not data:
        loss = lambda _, config, p, b: config["k"] * (p["w"] - b).square().sum()
        family = FAMILY._replace(data=None, loss=loss)
    meta = trees.map(lambda x: x.to("meta"), META)
    rule = estimators.full(RULE, family, num_tasks=2, horizon=T, eval_split="validation")
    got, _ = rule.estimate(meta, rule.init(meta, 0))
    assert got.metrics["losses"].device.type == "meta"


def test_drawing_what_is_evaluated_draws_no_task_again():
    calls = []

    def init(config, generator):
        calls.append(config)
        return FAMILY.init(config, generator)

    rule = estimators.full(
        RULE, FAMILY._replace(init=init), num_tasks=3, horizon=T, eval_split="validation"
    )
    rule.estimate(META, rule.init(META, 0))
    assert len(calls) == 3


# Divergence


def broken(how, bad):
    """The family, but tasks for whose curvature ``bad(k)`` holds go wrong."""

    def loss(data, config, p, b):
        value = FAMILY.loss(data, config, p, b)
        is_bad = bad(config["k"])
        if how == "loss":
            return torch.where(is_bad, torch.nan, value)
        # Finite, with a derivative that is not.
        return value + torch.where(is_bad, 0 * p["w"].sum(), 1.0).sqrt() - 1

    return FAMILY._replace(loss=loss)


def of_family(family, **options):
    estimator = estimators.full(RULE, family, horizon=T, **{"num_tasks": 3, **options})
    return estimator.estimate(META, estimator.init(META, 3))[0]


@pytest.mark.parametrize(("how", "step"), [("loss", 0), ("gradient", 1)])
def test_a_task_that_diverges_is_left_out_and_named(how, step):
    number = sample_task(FAMILY, T, 3, 0, 2).config["k"]
    got, want = of_family(broken(how, lambda k: k == number)), of_family(FAMILY, num_tasks=2)
    assert got.metrics["diverged"].tolist() == [False, False, True]
    assert got.metrics["diverged_at"].tolist() == [-1, -1, step]
    assert sample_task(FAMILY, T, *got.metrics["drawn"][2].tolist()).config["k"] == number
    close((got.loss, got.grads), (want.loss, want.grads))
    close(got.metrics["signal_to_noise"], want.metrics["signal_to_noise"])


def test_a_gradient_that_is_not_finite_counts_as_diverged():
    number = sample_task(FAMILY, T, 3, 0, 2).config["k"]

    def bind(meta, config):
        zero_or_one = torch.where(config["k"] == number, 0 * meta["lr"], 1.0).sqrt()
        return {**meta, "lr": meta["lr"] + 0 * zero_or_one}, None

    got, want = of_family(FAMILY, bind=bind), of_family(FAMILY, num_tasks=2)
    assert got.metrics["diverged"].tolist() == [False, False, True]
    assert got.metrics["diverged_at"].tolist() == [-1, -1, -1]
    close(got.grads, want.grads)


def test_an_evaluation_that_is_not_finite_counts_as_diverged():
    def batches(config, generator, steps, split="train"):
        found = FAMILY.batches(config, generator, steps, split)
        at = torch.tensor([[split == "validation"], *[[False]] * (steps - 1)])
        return torch.where(at & (config["k"] > 0), torch.nan, found)

    got = of_family(FAMILY._replace(batches=batches), eval_split="validation")
    assert got.metrics["diverged"].all()
    assert got.metrics["diverged_at"].tolist() == [0, 0, 0]
    assert got.loss.isnan()


def test_signal_to_noise_is_over_tasks():
    rows = torch.stack([torch.stack(trees.leaves(grad(by_hand)(META, i))) for i in range(3)])
    error = (rows.var(0) / 3).sum().sqrt()
    got = of_family(FAMILY).metrics
    close(got["standard_error"], error)
    close(got["signal_to_noise"], rows.mean(0).norm() / error)
    assert of_family(FAMILY, num_tasks=1).metrics["signal_to_noise"].isnan()


def test_a_mixture_is_the_weighted_mean_of_its_parts():
    both = estimators.full(RULE, mixture([FAMILY, FAMILY], (2, 1)), num_tasks=3, horizon=T)
    state = both.init(META, 0)
    got, _ = both.estimate(META, state)
    parts = [
        estimators.full(RULE, FAMILY, num_tasks=n, horizon=T).estimate(META, s)[0]
        for n, s in zip((2, 1), state, strict=True)
    ]
    close(got.grads, trees.map(lambda a, b: (2 * a + b) / 3, *[p.grads for p in parts]))
    close(got.metrics["losses"], torch.cat([p.metrics["losses"] for p in parts]))
    assert got.metrics["family"].tolist() == [0, 0, 1]


def test_what_a_rule_needs_beside_loss_and_horizon_is_refused_by_name():
    with pytest.raises(ValueError, match="this optimizer needs activations, noise"):
        estimate(rule=RULE._replace(needs=frozenset({"loss", "noise", "activations"})))


@pytest.mark.parametrize("build", [estimators.full, estimators.truncated])
def test_what_is_recomputed_is_run_again(build):
    calls = []

    def loss(*args):
        calls.append(1)
        return FAMILY.loss(*args)

    def evaluations(**options):
        own = {"truncation": T} if build is estimators.truncated else {}
        estimator = build(
            RULE, FAMILY._replace(loss=loss), num_tasks=2, horizon=T, **own, **options
        )
        state = estimator.init(META, 0)
        calls.clear()
        estimator.estimate(META, state)
        return len(calls)

    # Again in the backward pass, but for the first step, whose gradient does not depend on META;
    # and the look at the first step beforehand.
    assert evaluations() == T
    assert evaluations(recompute="rule") == T + 1
    assert evaluations(recompute="gradient") == 2 * T


@pytest.mark.parametrize("build", [estimators.full, estimators.truncated])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recompute": "all"}, 'recompute must be None, "gradient", "rule" or "both", got'),
        ({"mixed_mode": True, "recompute": "both"}, "cannot be combined with recompute='both'"),
        ({"mixed_mode": "keep"}, "mixed_mode must be False, True or"),
    ],
)
def test_options_that_do_not_go_together_are_refused_as_it_is_built(build, options, words):
    own = {"truncation": T} if build is estimators.truncated else {}
    with pytest.raises(ValueError, match=words):
        build(RULE, FAMILY, num_tasks=2, horizon=T, **own, **options)
