"""Truncated backpropagation: exact within a truncation, cut off at its beginning."""

import pytest
import torch
from torch.func import grad

import fmeta
from fmeta import estimators, optimizers, trees
from fmeta.tasks import TaskFamily, loss_of_task, mixture, sample_batches, sample_task

DOUBLE = {"dtype": torch.float64}


def quadratics(is_bad=lambda id: torch.zeros((), dtype=torch.bool)):
    def batches(config, generator, steps, split="train"):
        noise = torch.randn(steps, 3, generator=generator, **DOUBLE)
        return noise + (1.0 if split == "validation" else 0.0)

    def loss(data, config, p, b):
        value = (1 + config["id"]) * (data * (p["w"] - b).square()).sum()
        return torch.where(is_bad(config["id"]), torch.nan, value)

    return TaskFamily(
        torch.tensor([1.0, 2.0, 3.0], **DOUBLE),
        lambda generator: {"id": torch.rand((), generator=generator, **DOUBLE)},
        lambda config, generator: {"w": torch.randn(3, generator=generator, **DOUBLE)},
        batches,
        loss,
    )


FAMILY = quadratics()
RULE = fmeta.learn(optimizers.sgd, {"lr": "log", "momentum": "logit"}, lr=0.02, momentum=0.5)
META = trees.cast(RULE.init(), torch.float64)


def build(family=FAMILY, *, rule=RULE, **options):
    given = {"num_tasks": 3, "horizon": 6, "truncation": 3, "stagger": False, **options}
    return estimators.truncated(rule, family, **given)


def estimates(estimator, number, *, meta=META, seed=3):
    state, found = estimator.init(meta, seed), []
    for _ in range(number):
        one, state = estimator.estimate(meta, state)
        found.append(one)
    return found


def close(got, want, tol=1e-10):
    trees.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tol, atol=tol), got, want)


def by_hand(meta, drawn, steps, *, split=None):
    """The mean loss of a task's first steps: sampled and unrolled without the estimator."""
    task = sample_task(FAMILY, steps, *drawn)
    shown = split and sample_batches(FAMILY, task.config, steps, *drawn, split=split)
    args = (RULE, loss_of_task(FAMILY), meta, task.model_params, task.batches)
    run = fmeta.unroll(*args, loss_args=(task.config,), eval_batches=shown)
    return (run.losses if split is None else run.eval_losses).mean()


def mean_of(fn, drawn):
    return lambda meta: torch.stack([fn(meta, row) for row in drawn.tolist()]).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpoint": "sqrt"},
        {"checkpoint": 2},
        {"mixed_mode": True},
        {"recompute": "both"},
        {"recompute": "gradient", "checkpoint": "sqrt"},
        {"chunk_size": 2},
        {"eval_split": "validation"},
    ],
    ids=str,
)
def test_a_truncation_that_covers_the_horizon_is_exact(options):
    for found in estimates(build(horizon=5, truncation=5, **options), 2):
        split = options.get("eval_split")
        want = mean_of(
            lambda meta, row, s=split: by_hand(meta, row, 5, split=s), found.metrics["drawn"]
        )
        close(found.loss, want(META))
        close(found.grads, grad(want)(META))


def test_it_equals_full_on_the_same_tasks():
    same = FAMILY._replace(
        sample=lambda generator: {"id": torch.tensor(0.5, **DOUBLE)},
        init=lambda config, generator: {"w": torch.ones(3, **DOUBLE)},
        batches=lambda config, generator, steps, split="train": torch.zeros(steps, 3, **DOUBLE),
    )
    found = estimates(build(same, horizon=4, truncation=4), 1)[0]
    whole = estimators.full(RULE, same, num_tasks=3, horizon=4)
    want, _ = whole.estimate(META, whole.init(META, 3))
    close(found.loss, want.loss)
    close(found.grads, want.grads)


def test_trainings_go_on_where_they_were_and_gradients_do_not():
    """In closed form: L = w^2 / 2 and w <- (1 - a) w, so dL/da of a later piece is known."""
    family = TaskFamily(
        None,
        lambda generator: {},
        lambda config, generator: torch.ones((), **DOUBLE),
        lambda config, generator, steps, split="train": torch.zeros(steps, **DOUBLE),
        lambda data, config, w, b: w.square() / 2,
    )
    rule = fmeta.learn(optimizers.sgd, {"lr": "linear"}, lr=0.1)
    meta = {"lr": torch.tensor(0.1, **DOUBLE)}
    found = estimates(build(family, rule=rule, num_tasks=1, horizon=6, truncation=3), 3, meta=meta)
    for one, begin in zip(found, (0, 3, 0), strict=True):
        w = 0.9**begin  # a constant: how it came about is cut off
        # L_j = w^2 (1 - a)^(2 j) / 2 for j = 0, 1, 2
        close(
            one.loss, torch.tensor(sum(w**2 * 0.9 ** (2 * j) / 2 for j in range(3)) / 3, **DOUBLE)
        )
        want = sum(-j * w**2 * 0.9 ** (2 * j - 1) for j in range(3)) / 3
        close(one.grads["lr"], torch.tensor(want, **DOUBLE))
    whole = sum(-j * 0.9 ** (2 * j - 1) for j in range(6)) / 6
    short = (found[0].grads["lr"] + found[1].grads["lr"]) / 2
    assert whole < short < 0  # later steps gain more from a higher rate than it can see


def test_trainings_that_begin_within_a_truncation_count_from_there():
    found = estimates(build(horizon=2, truncation=4), 1)[0]
    first = mean_of(lambda meta, row: by_hand(meta, [*row[:3], 1], 2), found.metrics["drawn"])
    second = mean_of(lambda meta, row: by_hand(meta, row, 2), found.metrics["drawn"])
    close(found.grads, grad(lambda meta: (first(meta) + second(meta)) / 2)(META))


def test_the_start_of_training_is_learned_where_training_begins():
    start = {"w": torch.ones(3, **DOUBLE)}
    rule, bind = optimizers.sgd(0.02), lambda meta, config: ({}, meta)
    first, second = estimates(build(rule=rule, bind=bind), 2, meta=start)
    assert first.grads["w"].abs().min() > 1e-3
    assert not second.grads["w"].any()


def test_first_order_reaches_unroll():
    exact, first = (estimates(build(first_order=o), 1)[0] for o in (False, True))
    close(exact.loss, first.loss)
    assert (exact.grads["lr"] - first.grads["lr"]).abs() > 1e-6


def test_an_estimate_is_a_function_of_meta_parameters_and_state():
    one, two = build(stagger=True), build(stagger=True)
    state = one.init(META, 5)
    for _ in range(3):
        want, after = one.estimate(META, state)
        got, _ = two.estimate(META, state)
        assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))
        assert not any(x.requires_grad for x in trees.leaves((got, after[:-2])))
        state = after


def test_a_task_does_not_depend_on_how_many_there_are():
    few, many = (estimates(build(num_tasks=n), 3) for n in (2, 5))
    for a, b in zip(few, many, strict=True):
        close(b.metrics["losses"][:, :2], a.metrics["losses"])


def test_a_task_that_diverges_is_left_out_named_and_begun_anew():
    bad = sample_task(FAMILY, 1, 3, 0, 1, 2).config["id"]
    estimator = build(quadratics(lambda id: id == bad), horizon=2, truncation=3)
    first, second = estimates(estimator, 2)
    assert first.metrics["diverged"].tolist() == [False, True, False]
    assert first.metrics["diverged_at"].tolist() == [-1, 0, -1]
    assert first.metrics["drawn"].tolist() == [[3, 0, i, 2] for i in range(3)]
    # The others have a step left, so that they begin one training less.
    assert second.metrics["drawn"][:, 1:].tolist() == [[1, 0, 1], [1, 1, 2], [1, 2, 1]]
    assert not second.metrics["diverged"].any()


def test_the_step_is_that_of_the_training_not_of_the_truncation():
    late = lambda losses, evals, t, horizon: torch.where(t == 4, torch.nan, losses)
    found = estimates(build(meta_loss=late), 3)
    at = [f.metrics["diverged_at"].tolist() for f in found]
    assert at == [[-1] * 3, [4] * 3, [-1] * 3]  # then all begin anew


def test_first_batches_are_those_of_the_tasks_integers_and_later_ones_of_their_estimate():
    found = estimates(build(horizon=6, truncation=3), 2)
    for i in range(3):
        drawn = found[1].metrics["drawn"][i].tolist()
        config, params, first = sample_task(FAMILY, 3, *drawn)
        later = sample_batches(FAMILY, config, 3, drawn[0], 1, i, 0)
        args = (RULE, loss_of_task(FAMILY), META, params, torch.cat([first, later]))
        want = fmeta.unroll(*args, loss_args=(config,)).losses
        close(torch.cat([f.metrics["losses"][:, i, 0] for f in found]), want)


def test_stagger_begins_fresh_models_at_later_steps():
    seen = []

    def meta_loss(losses, evals, t, horizon):
        seen.append(t[0, :, 0].tolist())
        return losses

    options = {"num_tasks": 8, "horizon": 12, "meta_loss": meta_loss}
    staggered, plain = (estimates(build(stagger=s, **options), 1)[0] for s in (True, False))
    assert set(seen[0]) > {0}
    assert set(seen[1]) == {0}
    close(staggered.metrics["losses"], plain.metrics["losses"])  # the same trainings


def test_the_other_tasks_are_as_without_it():
    bad = sample_task(FAMILY, 1, 3, 0, 2, 1).config["id"]
    found = estimates(build(quadratics(lambda id: id == bad)), 1)[0]
    want = estimates(build(num_tasks=2), 1)[0]
    close((found.loss, found.grads), (want.loss, want.grads))
    close(found.metrics["standard_error"], want.metrics["standard_error"])


def test_a_mixture_is_the_weighted_mean_of_its_parts():
    family = mixture([FAMILY, FAMILY], (2, 1))
    both = build(family, num_tasks=3)
    state = both.init(META, 0)
    found, _ = both.estimate(META, state)
    parts = [build(num_tasks=n).estimate(META, s)[0] for n, s in zip((2, 1), state, strict=True)]
    close(found.grads, trees.map(lambda a, b: (2 * a + b) / 3, *[p.grads for p in parts]))


@pytest.mark.parametrize("name", ["num_tasks", "horizon", "truncation", "chunk_size"])
def test_numbers_below_1_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        build(**{name: 0})


def test_inference_mode_and_recording_outside_change_nothing():
    want = estimates(build(), 2)[-1]
    leaf = trees.map(lambda x: x.clone().requires_grad_(), META)
    got = estimates(build(), 2, meta=leaf)[-1]
    assert not any(x.requires_grad for x in trees.leaves((got.loss, got.grads)))
    close(got.grads, want.grads)
    with torch.inference_mode():
        close(estimates(build(), 2)[-1].grads, want.grads)


def test_parameters_hidden_states_and_horizons_go_on():
    fixed = FAMILY._replace(
        batches=lambda config, generator, steps, split="train": torch.zeros(steps, 3, **DOUBLE)
    )
    estimator = build(fixed, horizon=(5, 8), truncation=3)
    found = estimates(estimator, 12)
    losses = torch.cat([f.metrics["losses"][..., 0] for f in found])
    for i in range(3):
        drawn = found[0].metrics["drawn"][i].tolist()
        task = sample_task(fixed, 36, *drawn)
        args = (RULE, loss_of_task(fixed), META, task.model_params, task.batches)
        want = fmeta.unroll(*args, loss_args=(task.config,)).losses
        same = (losses[:, i] - want).abs() < 1e-10
        assert int(same.logical_not().int().argmax()) in (5, 8)  # then it is another training


def test_a_training_keeps_the_horizon_it_was_given_and_the_next_gets_its_own():
    estimator, known, ends = build(horizon=(5, 8), truncation=3), {}, set()
    state = estimator.init(META, 3)
    for _ in range(12):
        _, state = estimator.estimate(META, state)
        for name, horizon in zip(state.drawn.tolist(), state.horizon.tolist(), strict=True):
            assert known.setdefault(tuple(name), horizon) == horizon
            ends.add((name[2], horizon))
    assert len(ends) > 4  # two of the three tasks have had both at least


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 2},
        {"eval_split": "validation", "horizon": [4, 7]},
        {"first_order": "gradients"},
        {"num_tasks": 1},
        {"bind": lambda meta, config: (meta, {"w": meta["lr"].expand(3) + config["id"]})},
    ],
    ids=["plain", "chunks", "evaluated", "first order", "alone", "bound"],
)
def test_compiled_steps_have_the_same_gradients(options, monkeypatch):
    # All but the compiler itself, whose turn is in the slow test below.
    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: module)
    got, want = (estimates(build(**options, compile=c), 3) for c in (True, False))
    for a, b in zip(got, want, strict=True):
        close(a.loss, b.loss)
        close(a.grads, b.grads)
        close(a.metrics["losses"], b.metrics["losses"])


@pytest.mark.slow
def test_compiled_estimates_are_equal_to_rounding():
    got, want = (estimates(build(compile=c), 3) for c in (True, False))
    close([x.grads for x in got], [x.grads for x in want])


@pytest.mark.parametrize(
    "options", [{"checkpoint": "sqrt"}, {"mixed_mode": True}, {"recompute": "rule"}]
)
def test_compiled_steps_are_not_checkpointed(options):
    with pytest.raises(ValueError, match="neither checkpoint nor mixed_mode nor recompute"):
        build(compile=True, **options)
