"""PES: unbiased for long trainings, a function of its state, and task for task its own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

import fmeta
from fmeta import estimators, optimizers, trees
from fmeta._trace import Traced
from fmeta.estimators._draws import Draws
from fmeta.estimators._trainings import Trainings
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily, digits, loss_of_task, mixture, sample_task

DOUBLE = {"dtype": torch.float64}
START = {"w": torch.tensor([2.0, -1.0, 0.5], **DOUBLE)}
CURVATURE = torch.tensor([1.0, 3.0, 9.0], **DOUBLE)


def quadratics(random=True, is_bad=lambda noise: torch.zeros((), dtype=torch.bool)):
    """``k sum(curvature (w - b)^2) / 2``; without ``random`` all tasks and batches are the same."""

    def batches(config, generator, steps, split="train"):
        noise = torch.randn(steps, 3, generator=generator, **DOUBLE)
        return 0.3 * noise * random + (1.0 if split == "validation" else 0.0)

    def loss(data, config, p, b):
        value = config["k"] * (data * (p["w"] - b).square()).sum() / 2
        return torch.where(is_bad(config["id"]), torch.nan, value)

    return TaskFamily(
        CURVATURE,
        lambda generator: {
            "k": 1 + random * torch.rand((), generator=generator, **DOUBLE),
            "id": torch.rand((), generator=generator, **DOUBLE),
        },
        lambda config, generator: {
            "w": START["w"] + random * torch.randn(3, generator=generator, **DOUBLE)
        },
        batches,
        loss,
    )


RULE = fmeta.learn(optimizers.sgd, {"lr": "log", "momentum": "logit"}, lr=0.05, momentum=0.5)
META = trees.cast(RULE.init(), torch.float64)


def build(family=None, *, rule=RULE, **options):
    given = {"num_tasks": 4, "horizon": 6, "truncation": 2, "stagger": False, **options}
    return estimators.pes(rule, family or quadratics(), **given)


def estimates(estimator, number, *, meta=META, seed=0):
    state, found = estimator.init(meta, seed), []
    for _ in range(number):
        one, state = estimator.estimate(meta, state)
        found.append(one)
    return found


def close(got, want, tol=1e-10):
    trees.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tol, atol=tol), got, want)


def vector(tree):
    return torch.cat([x.reshape(-1) for x in trees.leaves(tree)])


def true_gradient(meta, horizon, bind=lambda meta: (meta, START), rule=RULE):
    """Of the mean loss over a whole training, by autograd through all of it."""
    family = quadratics(random=False)
    task = sample_task(family, horizon, 0)

    def mean_loss(meta):
        opt_params, start = bind(meta)
        args = (loss_of_task(family), opt_params, start, task.batches)
        return fmeta.unroll(rule, *args, loss_args=(task.config,)).losses.mean()

    return vector(grad(mean_loss)(meta))


def errors_away(estimator, want, *, whole, meta=META, runs=12, truncate=False):
    """Standard errors between the mean of runs of ``whole`` estimates each, and the truth."""
    means, state = [], estimator.init(meta, 0)
    for _ in range(runs):
        total = 0
        for _ in range(whole):
            if truncate:  # plain truncated ES: the sum of earlier perturbations is forgotten
                state = state._replace(xi=trees.map(torch.zeros_like, state.xi))
            found, state = estimator.estimate(meta, state)
            total = total + vector(found.grads)
        means.append(total / whole)
    means = torch.stack(means)
    return (means.mean(0) - want).norm() / (means.var(0) / runs).sum().sqrt()


# (horizon, truncation, estimates until trainings begin together with an estimate again)
PATTERNS = [(6, 2, 3), (5, 3, 5), (2, 5, 2)]


@pytest.mark.parametrize(("horizon", "truncation", "whole"), PATTERNS)
def test_its_mean_is_the_true_gradient(horizon, truncation, whole):
    estimator = build(
        quadratics(random=False), num_tasks=60, horizon=horizon, truncation=truncation, std=1e-3
    )
    assert errors_away(estimator, true_gradient(META, horizon), whole=whole) < 3


def test_truncated_es_has_another_mean():
    estimator = build(quadratics(random=False), num_tasks=60, std=1e-3)
    want = true_gradient(META, 6)
    assert errors_away(estimator, want, whole=3, truncate=True) > 10


def test_the_start_of_training_can_be_learned():
    rule, bind = optimizers.sgd(0.05), lambda meta, config: ({}, meta)
    estimator = build(quadratics(random=False), rule=rule, bind=bind, num_tasks=60, std=1e-3)
    want = true_gradient(START, 6, lambda start: ({}, start), rule)
    assert errors_away(estimator, want, whole=3, meta=START) < 3


def test_an_estimate_is_a_function_of_meta_parameters_and_state():
    one, two = build(), build()
    state = one.init(META, 5)
    for _ in range(4):
        want, after = one.estimate(META, state)
        got, again = two.estimate(META, state)  # an estimator that has seen nothing else
        assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))
        assert all(type(x) is int or isinstance(x, torch.Tensor) for x in trees.leaves(after))
        close(trees.leaves(again)[:-2], trees.leaves(after)[:-2], 0)
        state = after


def test_a_task_does_not_depend_on_how_many_there_are():
    few, many = (estimates(build(num_tasks=n), 4) for n in (2, 5))
    for a, b in zip(few, many, strict=True):
        close(b.metrics["losses"][:, :2], a.metrics["losses"])
        assert torch.equal(b.metrics["drawn"][:2], a.metrics["drawn"])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_chunks_change_nothing(size):
    for got, want in zip(estimates(build(chunk_size=size), 4), estimates(build(), 4), strict=True):
        close(got.grads, want.grads)


def test_tasks_of_a_particle_share_its_perturbation():
    names, estimator = (
        [],
        build(
            quadratics(random=False),
            num_particles=2,
            perturb=lambda meta, step, i: (
                names.append((step, i))
                or trees.map(lambda x: torch.full_like(x, 0.01 * (i + 1)), meta)
            ),
        ),
    )
    found = estimates(estimator, 1)[0]
    losses = found.metrics["losses"]
    assert names == [(0, 0), (0, 1)]
    close(losses[:, 0], losses[:, 1])
    close(losses[:, 2], losses[:, 3])
    assert (losses[:, 0] - losses[:, 2]).abs().max() > 1e-4
    # Two independent draws, however many tasks: the standard error is that of two.
    halves = estimates(
        build(
            quadratics(random=False),
            num_tasks=2,
            perturb=lambda meta, step, i: trees.map(
                lambda x: torch.full_like(x, 0.01 * (i + 1)), meta
            ),
        ),
        1,
    )[0]
    close(found.metrics["standard_error"], halves.metrics["standard_error"])


def test_an_eval_split_is_what_counts():
    shown = estimates(build(eval_split="validation"), 1)[0]
    own = estimates(build(eval_split="validation", meta_loss=lambda l, e, t, horizon: l), 1)[0]
    plain = estimates(build(), 1)[0]
    close(own.loss, plain.loss)
    close(own.grads, plain.grads)
    assert (shown.loss - own.loss).abs() > 1e-3


def test_a_meta_loss_sees_step_and_horizon():
    seen = []

    def last_only(losses, evals, t, horizon):
        seen.append((t[:, 0, 0].tolist(), horizon[:, 0, 0].tolist()))
        return torch.where(t + 1 == horizon, losses, 0.0)

    found = estimates(build(horizon=3, truncation=4, meta_loss=last_only), 2)
    assert seen == [([0, 1, 2, 0], [3] * 4), ([1, 2, 0, 1], [3] * 4)]
    want = found[0].metrics["losses"][2].mean() / 4
    close(found[0].loss, want)


def test_a_meta_loss_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="meta_loss must return a value for each step"):
        estimates(build(meta_loss=lambda l, e, t, horizon: l.mean(0)[:1].T), 1)


# Divergence


def bad_one(num_tasks=4, **options):
    """An estimator with one task, of those of the first estimate, whose losses are NaN."""
    clean = quadratics()
    drawn = [sample_task(clean, 1, 0, 0, i, 1).config["id"] for i in range(num_tasks)]
    family = quadratics(is_bad=lambda id: id == drawn[2])
    return build(family, num_tasks=num_tasks, **options), drawn[2]


@pytest.mark.parametrize("trace", [False, True])
def test_a_task_that_diverges_is_left_out_named_and_begun_anew(trace):
    estimator, number = bad_one(trace=trace)
    first, second = estimates(estimator, 2)
    assert first.metrics["diverged"].tolist() == [False, False, True, False]
    assert first.metrics["diverged_at"].tolist() == [-1, -1, 0, -1]
    named = sample_task(quadratics(), 2, *first.metrics["drawn"][2].tolist())
    assert named.config["id"] == number
    assert not second.metrics["diverged"].any()
    assert second.metrics["drawn"][2].tolist() == [0, 1, 2, 1]
    assert second.metrics["drawn"][:2].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]


def test_the_other_tasks_are_as_without_it():
    sound, (broken, _) = build(), bad_one()
    alone = []
    for i in (0, 1, 3):  # each one's own part, from the perturbation and its losses
        found, state = sound.estimate(META, sound.init(META, 0))
        losses = found.metrics["losses"][:, i]
        difference = (losses[:, 0] - losses[:, 1]).mean() / (2 * 0.01**2)
        alone.append(trees.map(lambda x, i=i, d=difference: d * x[i], state.xi))
    want = trees.map(lambda *xs: sum(xs) / 3, *alone)
    found = estimates(broken, 1)[0]
    close(found.grads, want)
    close(found.loss, estimates(sound, 1)[0].metrics["losses"][:, [0, 1, 3]].mean())


def test_the_name_is_that_of_the_task_begun_within_the_truncation():
    # In step 3 of the first estimate each task begins a second training.
    bad = sample_task(quadratics(), 1, 0, 0, 1, 2).config["id"]
    estimator = build(quadratics(is_bad=lambda id: id == bad), horizon=3, truncation=5)
    metrics = estimates(estimator, 1)[0].metrics
    assert metrics["diverged_at"].tolist() == [-1, 0, -1, -1]  # of its own steps
    assert metrics["drawn"].tolist() == [[0, 0, i, 2] for i in range(4)]


def test_a_training_that_ends_badly_is_named_though_another_begins_after_it():
    bad = sample_task(quadratics(), 1, 0, 0, 1, 1).config["id"]
    estimator = build(quadratics(is_bad=lambda id: id == bad), horizon=3, truncation=5)
    metrics = estimates(estimator, 1)[0].metrics
    assert metrics["diverged_at"].tolist() == [-1, 0, -1, -1]
    assert metrics["drawn"][1].tolist() == [0, 0, 1, 1]


def test_the_step_is_that_of_the_training_not_of_the_truncation():
    late = lambda losses, evals, t, horizon: torch.where(t == 5, torch.nan, losses)
    found = estimates(build(horizon=8, truncation=4, meta_loss=late), 3)
    at = [f.metrics["diverged_at"].tolist() for f in found]
    assert at == [[-1] * 4, [5] * 4, [-1] * 4]  # then all begin anew


def test_where_only_the_gradient_is_bad_the_last_training_is_named():
    huge = lambda meta, step, i: trees.map(lambda x: 0 * x + (math.inf if i == 1 else 0.01), meta)
    fixed = lambda meta, config: (META, None)
    found = estimates(build(horizon=3, truncation=5, perturb=huge, bind=fixed), 1)[0]
    assert found.metrics["diverged"].tolist() == [False, True, False, False]
    assert found.metrics["diverged_at"].tolist() == [-1] * 4
    assert found.metrics["drawn"][1].tolist() == [0, 0, 1, 2]


def test_when_all_diverge_nothing_is_estimated():
    found = estimates(build(quadratics(is_bad=lambda id: id >= 0)), 1)[0]
    assert found.metrics["diverged"].all()
    assert found.loss.isnan()
    assert all(g.isnan().all() for g in trees.leaves(found.grads))


# Mixtures


def test_a_mixture_is_the_weighted_mean_of_its_parts():
    one, other = quadratics(), quadratics(random=False)
    both = build(mixture([one, other], (3, 1)), num_tasks=8)
    state = both.init(META, 0)
    found, _ = both.estimate(META, state)
    parts = [
        build(family, num_tasks=n).estimate(META, s)[0]
        for family, n, s in zip((one, other), (6, 2), state, strict=True)
    ]
    close(found.grads, trees.map(lambda a, b: 0.75 * a + 0.25 * b, *[p.grads for p in parts]))
    close(found.loss, 0.75 * parts[0].loss + 0.25 * parts[1].loss)
    assert found.metrics["family"].tolist() == [0] * 6 + [1] * 2
    assert found.metrics["losses"].shape == (2, 8, 2)
    a, b = (p.metrics["standard_error"] for p in parts)
    close(found.metrics["standard_error"], ((0.75 * a) ** 2 + (0.25 * b) ** 2).sqrt())


def test_a_family_all_of_whose_tasks_diverge_is_left_out():
    sound, broken = quadratics(), quadratics(is_bad=lambda id: id >= 0)
    both = build(mixture([sound, broken]), num_tasks=6)
    state = both.init(META, 0)
    found, _ = both.estimate(META, state)
    alone, _ = build(sound, num_tasks=3).estimate(META, state[0])
    close(found.grads, alone.grads)
    close(found.metrics["standard_error"], alone.metrics["standard_error"])
    assert found.metrics["diverged"].tolist() == [False] * 3 + [True] * 3
    all_bad = build(mixture([broken, broken]), num_tasks=6)
    assert estimates(all_bad, 1)[0].loss.isnan()


def test_families_of_other_structure_share_a_mixture():
    rule = optimizers.linear()
    family = mixture([digits((4,), batch_size=4), digits((4, 4), batch_size=4)])
    found = estimates(build(family, rule=rule), 2, meta=rule.init())[-1]
    assert found.metrics["family"].tolist() == [0, 0, 1, 1]
    assert not found.metrics["diverged"].any()


# Recording


@pytest.mark.parametrize("name", ["normalized_mlp", "adam"])
def test_recorded_steps_equal_plain_ones_bit_for_bit(name):
    if name == "adam":
        rule = fmeta.learn(optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=1e-2)
    else:
        rule = optimizers.normalized_mlp()
    options = {"rule": rule, "num_tasks": 2, "horizon": 4, "truncation": 3}
    family = digits((8,), batch_size=16)
    plain, recorded = (
        estimates(build(family, trace=t, **options), 3, meta=rule.init()) for t in (False, True)
    )
    for a, b in zip(plain, recorded, strict=True):
        assert torch.equal(a.metrics["losses"], b.metrics["losses"])
        assert all(map(torch.equal, trees.leaves(a.grads), trees.leaves(b.grads)))


@pytest.mark.parametrize("trace", [False, True])
def test_a_loss_that_draws_is_refused(trace):
    noisy = quadratics()._replace(loss=lambda d, c, p, b: (p["w"] + torch.randn(3)).sum())
    with pytest.raises(RuntimeError, match="random operation"):
        estimates(build(noisy, trace=trace), 1)


# Plans


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=2),
    st.integers(1, 6),
    st.integers(1, 3),
    st.booleans(),
)
def test_a_plan_fills_the_truncation_with_whole_trainings(horizons, truncation, num_tasks, stagger):
    draws = Draws(quadratics(), num_tasks, horizons, truncation, None, stagger)
    zeros = torch.zeros(num_tasks, dtype=torch.int64)
    config = {k: zeros.double() for k in ("k", "id")}
    now = Trainings((), (), config, zeros, zeros, torch.zeros(num_tasks, 4, dtype=torch.int64))
    for step in range(4):
        plan = draws.plan(1, step, now, None)
        assert plan.batches.shape == (truncation, num_tasks, 3)
        before, ends = now.t, now.horizon
        for k in range(truncation):
            over = before >= ends
            assert torch.equal(plan.is_new[k], over)
            go_on = torch.where(over, plan.t[k], before)
            assert torch.equal(plan.t[k], go_on)
            assert bool((plan.t[k] < plan.horizon[k]).all())
            assert set(plan.horizon[k].tolist()) <= set(horizons)
            if not stagger or step or k:  # only the first trainings of all may end early
                assert not plan.t[k][over].any()
            before, ends = plan.t[k] + 1, plan.horizon[k]
        begun = sorted((s.k, i) for s in plan.starts for i in s.places.tolist())
        assert begun == [tuple(x) for x in plan.is_new.nonzero().tolist()]
        now = now._replace(t=before, horizon=ends, drawn=plan.drawn[-1])


def test_staggered_trainings_end_at_different_steps():
    draws = Draws(quadratics(), 20, 40, 10, None, True)
    zeros = torch.zeros(20, dtype=torch.int64)
    now = Trainings((), (), {"k": zeros}, zeros, zeros, torch.zeros(20, 4, dtype=torch.int64))
    assert set(draws.plan(0, 0, now, None).t[0].tolist()) == {0, 10, 20, 30}


def test_only_the_first_trainings_end_early():
    draws = Draws(quadratics(), 20, (2, 8), 4, None, True)
    zeros = torch.zeros(20, dtype=torch.int64)
    now = Trainings((), (), {"k": zeros}, zeros, zeros, torch.zeros(20, 4, dtype=torch.int64))
    plan = draws.plan(0, 0, now, None)
    second = plan.is_new & (plan.drawn[..., 3] > 1)
    assert (plan.horizon[second] == 8).any()
    assert not plan.t[second].any()


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be at least 1, got 0"),
        ({"truncation": 1.5}, "truncation must be an integer"),
        ({"horizon": []}, "horizon is empty"),
        ({"horizon": (5, 0)}, "horizon must be at least 1, got 0"),
        ({"std": 0.0}, "std must be positive"),
        ({"std": math.inf}, "std must be positive and finite"),
        ({"num_particles": 3}, "num_tasks must be a multiple of num_particles, got 4 and 3"),
        ({"rule": RULE._replace(needs=frozenset({"loss", "noise"}))}, "needs noise, but"),
        ({"family": mixture([quadratics()] * 5)}, "a mixture of 5 families"),
    ],
)
def test_wrong_numbers_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_what_is_no_family_is_refused():
    with pytest.raises(TypeError, match="family must be a TaskFamily or a mixture"):
        build([quadratics()])


@pytest.mark.parametrize(
    ("meta", "error", "message"),
    [
        ({"lr": torch.tensor(3)}, TypeError, "at path lr is torch.int64"),
        ({"lr": 0.1}, TypeError, "at path lr is float"),
        ({}, ValueError, "nothing to learn"),
    ],
)
def test_meta_parameters_are_floating_tensors(meta, error, message):
    with pytest.raises(error, match=message):
        build().init(meta, 0)


def test_a_perturbation_of_another_shape_is_refused():
    bad = build(perturb=lambda meta, step, i: {"lr": torch.zeros(2, **DOUBLE)})
    with pytest.raises(ValueError, match="what perturb returned"):
        estimates(bad, 1)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    estimates(build(), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_perturbations_are_normal_and_scaled():
    state = build(num_tasks=400, std=0.2).init(META, 0)
    _, after = build(num_tasks=400, std=0.2).estimate(META, state)
    xi = torch.stack(trees.leaves(after.xi))
    assert abs(float(xi.mean())) < 0.02
    assert abs(float(xi.std()) - 0.2) < 0.02
    eps = torch.randn((), generator=fold_in(0, 0, 7, 4), **DOUBLE)
    close(trees.leaves(after.xi)[0][7], 0.2 * eps)


def test_gradients_are_of_the_dtype_of_the_meta_parameters():
    for dtype in (torch.float32, torch.bfloat16):
        found = estimates(build(), 1, meta=trees.cast(META, dtype))[0]
        assert all(g.dtype is dtype for g in trees.leaves(found.grads))


def test_inference_mode_and_recording_outside_change_nothing():
    want = estimates(build(), 2)[-1]
    leaf = trees.map(lambda x: x.clone().requires_grad_(), META)
    got = estimates(build(), 2, meta=leaf)[-1]
    assert not any(x.requires_grad for x in trees.leaves((got.loss, got.grads)))
    close(got.grads, want.grads)
    with torch.inference_mode():
        close(estimates(build(), 2)[-1].grads, want.grads)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_of_one_member_are_recorded_too(chunk_size, monkeypatch):
    unrecorded = []
    monkeypatch.setattr(Traced, "_unrecorded", lambda self, error: unrecorded.append(error))
    rule, family = optimizers.mlp(), digits((4,), batch_size=8)
    settings = {"num_tasks": 2, "horizon": 4, "truncation": 2, "std": 0.01}
    found = []
    for more in ({"chunk_size": chunk_size}, {}):
        estimator = estimators.pes(rule, family, **settings, **more)
        th = rule.init(torch.Generator().manual_seed(0))
        found.append(estimator.estimate(th, estimator.init(th, 0))[0].grads)
    assert not unrecorded
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
