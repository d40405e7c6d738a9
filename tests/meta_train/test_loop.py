"""The outer loop: what is skipped, averaged and chosen; stopping anywhere changes nothing."""

import contextlib
import functools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fmeta
from fmeta.estimators import Estimator
from fmeta.meta_train import resume, run

W = {"w": torch.tensor([3.0, -2.0])}
SGD = fmeta.optimizers.sgd(0.1)
ALL = {i: 5 for i in range(4)}


def iterates(estimator, num_steps, **options):
    """Meta-parameters after 0, 1, ..., ``num_steps`` outer steps."""
    made = [W]
    for n in range(1, num_steps + 1):
        made.append(run(estimator, W, outer=SGD, num_steps=n, **options).meta_params)
    return [x["w"] for x in made]


def stopping_at(noisy, place, stop):
    """An estimator, a validation and a callback of which one stops the run, once, at a step."""
    made = [0]  # outer steps, as the validation sees them

    def check(name, step):
        made[0] = step
        if (name, step) == (place, stop):
            raise KeyboardInterrupt

    def validate(meta_params):
        if (place, made[0]) == ("validate", stop):
            raise KeyboardInterrupt
        return (meta_params["w"] - 1).square().sum()

    at = {3: {1: 2}, 6: ALL, 7: ALL}
    estimator = noisy(at, before=lambda step: check("estimate", step))
    return estimator, {
        "validate": validate,
        "on_step": lambda metrics: check("on_step", metrics["step"]),
    }


@settings(max_examples=10)
@given(
    stops=st.lists(st.integers(0, 11), min_size=1, max_size=3),
    averaging=st.sampled_from([None, 0.0, 0.5]),
    every=st.integers(1, 5),
    place=st.sampled_from(["estimate", "validate", "on_step"]),
)
def test_stopped_anywhere_and_resumed_equals_uninterrupted(noisy, stops, averaging, every, place):
    outer = fmeta.chain(fmeta.clip_by_global_norm(1.0), fmeta.optimizers.adam(0.1))
    options = {"outer": outer, "num_steps": 12, "seed": 5, "averaging": averaging}
    options |= {"validate_every": 3, "checkpoint_every": every}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        estimator, calls = stopping_at(noisy, place, None)
        log = {"log": folder / "whole.jsonl"}
        whole = run(estimator, W, checkpoint_folder=folder / "whole", **log, **calls, **options)

        log = {"log": folder / "cut.jsonl"}
        for stop in (*sorted(stops), None):
            estimator, calls = stopping_at(noisy, place, stop)
            with contextlib.suppress(KeyboardInterrupt):
                if (folder / "cut").exists():
                    result = resume(folder / "cut", estimator, W, **log, **calls, **options)
                else:
                    result = run(
                        estimator, W, checkpoint_folder=folder / "cut", **log, **calls, **options
                    )
        assert torch.equal(result.meta_params["w"], whole.meta_params["w"])
        assert result._replace(meta_params=0, history=0) == whole._replace(meta_params=0, history=0)
        for file in ("{}/state.safetensors", "{}.jsonl"):
            got, want = ((folder / file.format(k)).read_bytes() for k in ("cut", "whole"))
            assert got == want


def test_a_step_of_which_all_tasks_diverge_is_skipped(noisy):
    at = {3: ALL, 4: ALL, 6: {0: 1}}
    result = run(noisy(at), W, outer=SGD, num_steps=8)
    assert (result.step, result.skipped) == (8, 2)
    assert [m.get("skipped") for m in result.history] == [None] * 3 + [1, 2] + [None] * 3
    assert torch.isfinite(result.meta_params["w"]).all()
    # Tasks are those of the step's number, so skipping shifts nothing.
    w = W["w"]
    for k in (0, 1, 2, 5, 6, 7):
        noise = 0.01 * torch.randn((), generator=fmeta.random.fold_in(0, k))
        w = w - 0.1 * (w + noise)
    torch.testing.assert_close(result.meta_params["w"], w)


def test_skipped_steps_keep_the_outer_optimizers_state(noisy):
    adam = fmeta.optimizers.adam(0.1)
    skipping = run(noisy({2: ALL}), W, outer=adam, num_steps=3)
    plain = run(noisy(), W, outer=adam, num_steps=2)
    assert torch.equal(skipping.meta_params["w"], plain.meta_params["w"])


@pytest.mark.parametrize("limit", [1, 3])
def test_too_many_skipped_steps_in_a_row_are_an_error(noisy, tmp_path, limit):
    estimator = noisy({k: ALL for k in range(4, 4 + limit)})
    last = 3 + limit
    words = (
        rf"outer step {last}: 4 of 4 tasks diverged: task 0 at inner step 5, .*; "
        rf"the meta-loss is nan .*{limit} such steps in a row.*shorten"
    )
    options = {"outer": SGD, "num_steps": 9}
    with pytest.raises(FloatingPointError, match=words):
        run(estimator, W, max_skipped=limit, checkpoint_folder=tmp_path, **options)
    result = resume(tmp_path, estimator, W, max_skipped=limit + 1, **options)
    assert result.history[0]["step"] == last  # the state before it was saved
    assert result.skipped == limit
    assert torch.equal(result.meta_params["w"], run(estimator, W, **options).meta_params["w"])


def test_the_step_that_ends_a_run_is_in_its_log(noisy, tmp_path):
    log, options = tmp_path / "m.jsonl", {"outer": SGD, "num_steps": 5}
    options |= {"checkpoint_folder": tmp_path / "run", "log": log}
    estimator = noisy({2: ALL, 3: ALL})
    with pytest.raises(FloatingPointError):
        run(estimator, W, max_skipped=2, **options)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["step"], row.get("skipped")) for row in rows] == [
        (0, None),
        (1, None),
        (2, 1),
        (3, 2),
    ]
    assert [task["task"] for task in rows[3]["diverged_tasks"]] == [0, 1, 2, 3]
    resume(options.pop("checkpoint_folder"), estimator, W, max_skipped=3, **options)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]  # the last one is not there twice


def test_a_run_ends_by_itself_where_the_estimator_does_not_say_what_diverged():
    def estimate(meta_params, state):
        return fmeta.estimators.Estimate(torch.tensor(math.nan), meta_params, {}), state

    with pytest.raises(FloatingPointError, match=r"^outer step 1: the meta-loss is nan"):
        run(Estimator(lambda m, s: {}, estimate), W, outer=SGD, num_steps=3, max_skipped=2)


def test_skipped_steps_apart_from_each_other_are_no_error(noisy):
    result = run(noisy({k: ALL for k in range(0, 9, 2)}), W, outer=SGD, num_steps=9, max_skipped=2)
    assert result.skipped == 5


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_meta_gradient_that_is_not_finite_never_reaches_the_outer_optimizer(noisy, value):
    good, seen = noisy(), []

    def estimate(meta_params, state):
        found, new = good.estimate(meta_params, state)
        if state["step"] == 1:  # in one coordinate only, with a finite loss
            found = found._replace(grads={"w": found.grads["w"] + torch.tensor([0.0, value])})
        return found, new

    def step(theta, params, grads, hidden):
        seen.append(grads["w"])
        return params, hidden

    outer = fmeta.optimizer_from_step(lambda g: {}, lambda theta, params: {}, step)
    run(Estimator(good.init, estimate), W, outer=outer, num_steps=3)
    assert len(seen) == 2
    assert torch.stack(seen).isfinite().all()


def test_an_outer_optimizer_that_overflows_is_an_error_before_it_is_saved(noisy, tmp_path):
    def step(theta, params, grads, hidden):
        return {"w": params["w"] / 0}, hidden

    outer = fmeta.optimizer_from_step(lambda g: {}, lambda theta, params: {}, step)
    words = "outer step 0: the outer optimizer made the meta-parameter at w non-finite.*learning"
    with pytest.raises(FloatingPointError, match=words):
        run(noisy(), W, outer=outer, num_steps=3, checkpoint_folder=tmp_path)
    options = {"outer": SGD, "num_steps": 3}
    assert resume(tmp_path, noisy(), W, **options).history == run(noisy(), W, **options).history


@pytest.mark.parametrize(("averaging", "first"), [(0.0, 1), (0.5, 6), (0.75, 8), (0.95, 10)])
def test_the_average_is_the_mean_of_the_last_iterates(noisy, averaging, first):
    result = run(noisy(), W, outer=SGD, num_steps=10, averaging=averaging)
    want = torch.stack(iterates(noisy(), 10)[first:]).double().mean(0)
    torch.testing.assert_close(result.meta_params["w"].double(), want, rtol=1e-6, atol=1e-7)


def test_the_average_is_what_is_validated(noisy):
    seen = []

    def validate(meta_params):
        seen.append(meta_params["w"])
        return -len(seen)  # each is the best so far

    options = {"outer": SGD, "num_steps": 6, "averaging": 0.5}
    result = run(noisy(), W, validate=validate, validate_every=3, **options)
    made = iterates(noisy(), 6)
    assert torch.equal(seen[1], made[3])  # before averaging begins
    torch.testing.assert_close(seen[2], sum(made[4:]) / 3)
    assert torch.equal(result.meta_params["w"], seen[2])


def test_the_average_is_in_the_compute_dtype_and_comes_back_in_the_parameters(noisy):
    half = {"w": W["w"].to(torch.bfloat16)}
    many = 40
    result = run(noisy(), half, outer=fmeta.optimizers.sgd(0.0), num_steps=many, averaging=0.0)
    assert result.meta_params["w"].dtype is torch.bfloat16
    assert torch.equal(result.meta_params["w"], half["w"])  # in bfloat16 the sum would drift


def test_skipped_steps_do_not_count_in_the_average(noisy):
    at = {k: ALL for k in (1, 2, 3)}
    got = run(noisy(at), W, outer=fmeta.optimizers.sgd(1.0), num_steps=5, averaging=0.0)
    steps = [-0.01 * torch.randn((), generator=fmeta.random.fold_in(0, k)) for k in (0, 4)]
    torch.testing.assert_close(got.meta_params["w"], (sum(steps) / 2).expand(2))


def test_select_last_takes_the_last_where_best_takes_the_best(noisy):
    options = {"outer": SGD, "num_steps": 20, "validate_every": 5}
    options["validate"] = lambda meta_params: (meta_params["w"][0] - 1.8).abs()  # on the way to 0
    best, last = (run(noisy(), W, select=s, **options).meta_params["w"] for s in ("best", "last"))
    assert torch.equal(last, run(noisy(), W, outer=SGD, num_steps=20).meta_params["w"])
    assert torch.equal(best, iterates(noisy(), 5)[-1])


def test_the_outer_optimizers_own_parameters_to_evaluate_with_are_judged(noisy):
    seen = []
    outer = SGD._replace(eval_params=lambda theta, params, hidden: {"w": params["w"] + 100})
    options = {"outer": outer, "num_steps": 2, "validate_every": 2}
    result = run(noisy(), W, validate=lambda p: seen.append(p["w"]) or 0.0, **options)
    assert torch.equal(seen[0], W["w"] + 100)
    assert torch.equal(result.meta_params["w"], seen[0])


def test_the_metrics_of_a_step_are_plain_and_name_what_diverged(noisy):
    seen = []
    run(noisy({1: {2: 7, 0: -1}}), W, outer=SGD, num_steps=2, on_step=seen.append)
    assert seen[0].keys() == {"step", "meta_loss", "meta_grad_norm", "signal_to_noise", "diverged"}
    assert (seen[0]["diverged"], seen[0]["signal_to_noise"]) == (0.0, 2.0)
    assert seen[1]["diverged"] == 0.5
    assert seen[1]["diverged_tasks"] == [{"task": 0}, {"task": 2, "inner_step": 7}]


def test_the_norm_is_of_all_leaves_and_leaves_without_gradient_do_not_count():
    def estimate(meta_params, state):
        grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "c": None}
        return fmeta.estimators.Estimate(torch.tensor(1.0), grads, {}), state

    start = {k: torch.zeros(1) for k in "abc"}
    result = run(Estimator(lambda m, s: {}, estimate), start, outer=SGD, num_steps=1)
    assert result.history[0]["meta_grad_norm"] == 5.0
    assert torch.equal(result.meta_params["c"], start["c"])


# Wrong use

WRONG = [
    ({"averaging": 1.0}, ValueError, r"averaging must be a fraction .* in \[0, 1\), got 1\.0"),
    ({"averaging": -0.1}, ValueError, "averaging must be a fraction"),
    ({"averaging": "half"}, TypeError, "averaging must be a number, got 'half'"),
    ({"select": "first"}, ValueError, 'select must be "best" or "last", got \'first\''),
    ({"max_skipped": 0}, ValueError, "max_skipped must be at least 1, got 0"),
    ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
    ({"num_steps": 2.5}, ValueError, r"num_steps must be an integer, got 2\.5"),
    ({"validate_every": None}, ValueError, "validate_every must be an integer, got None"),
    ({"checkpoint_every": "3"}, ValueError, "checkpoint_every must be an integer, got '3'"),
    ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
    ({"patience": 2}, ValueError, "patience counts validations, so it needs validate"),
    ({"seed": 0.5}, TypeError, r"seed must be an integer, got 0\.5"),
    ({"validate": 3.0}, TypeError, r"validate must be a function.*got 3\.0"),
    ({"validate": lambda: 3.0}, TypeError, r"called as validate\(meta_params\), but.*takes \(\)"),
    ({"on_step": lambda step, m: 0}, TypeError, r"on_step\(metrics\), but.*takes \(step, m\)"),
    ({"about": "digits"}, TypeError, "about must be a dict of plain values, got 'digits'"),
    ({"outer": fmeta.optimizers.sgd}, TypeError, r"outer must be.*call the builder: sgd\(...\)"),
]


@pytest.mark.parametrize(("options", "error", "words"), WRONG, ids=range(len(WRONG)))
def test_options_that_cannot_be_meant_are_refused_before_any_work(
    noisy, tmp_path, options, error, words
):
    folder = tmp_path / "run"
    with pytest.raises(error, match=words):
        run(noisy(), W, **{"outer": SGD, "num_steps": 3, "checkpoint_folder": folder, **options})
    assert not folder.exists()


def test_only_estimators_are_meta_trained(tmp_path):
    for value, words in (
        (fmeta.estimators.full, r"got function: call the builder: full\(\.\.\.\)"),
        ("pes", r"got str: build one.*Estimator\(init, estimate\)"),
    ):
        for start in (run, functools.partial(resume, tmp_path)):
            with pytest.raises(TypeError, match=f"estimator must be an Estimator, {words}"):
                start(value, W, outer=SGD, num_steps=3)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.ones(3), r"a tensor of shape \(3,\): take the mean"),
        (np.ones(2), r"array\(\[1\., 1\.\]\): take the mean"),
        (None, "None"),
        ("1", "'1'"),
    ],
)
def test_a_validation_gives_a_number(noisy, value, got):
    with pytest.raises(ValueError, match=f"validate must return a number, got {got}"):
        run(noisy(), W, outer=SGD, num_steps=3, validate=lambda meta_params: value)


NUMPY = [
    {"validate": lambda meta_params: np.float32(0.5)},
    {"validate": lambda meta_params: np.array(0.5)},
    {"validate": lambda meta_params: torch.tensor([0.5])},
    {"num_steps": np.int64(3), "validate_every": np.int64(2), "max_skipped": np.int32(2)},
    {"averaging": np.float32(0.5), "checkpoint_every": np.int64(2)},
]


@pytest.mark.parametrize("options", NUMPY, ids=range(len(NUMPY)))
def test_numbers_of_numpy_are_numbers(noisy, tmp_path, options):
    plain = {
        name: (lambda meta_params: 0.5) if callable(value) else value.item()
        for name, value in options.items()
    }
    folders = {"checkpoint_folder": tmp_path / "a"}, {"checkpoint_folder": tmp_path / "b"}
    got, want = (
        run(noisy(), W, **{"outer": SGD, "num_steps": 3, **folder, **given})
        for folder, given in zip(folders, (options, plain), strict=True)
    )
    assert torch.equal(got.meta_params["w"], want.meta_params["w"])
    assert got.history == want.history
