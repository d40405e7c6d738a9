"""Evaluations: equal conditions for all, numbers of plain training loops, nothing left out."""

import math

import pytest
import torch
from torch.nn import functional as F

import fmeta
from fmeta import evaluate, optimizers
from fmeta.evaluate._measure import log_spaced
from fmeta.tasks import digits, loss_of_task, sample_batches, sample_task

STEPS, SEEDS, SEED = 12, 3, 5
LENGTHS = {"num_steps": STEPS, "num_seeds": SEEDS, "seed": SEED}
ALONE = {**LENGTHS, "baselines": ()}


def sgd(lr):
    return optimizers.sgd(lr), {}


def trained_by_torch(family, make, i, steps):
    """Losses and final parameters of a loop in torch, on task i."""
    task = sample_task(family, steps, SEED, i)
    params = {k: p.clone().requires_grad_() for k, p in task.model_params.items()}
    opt, losses = make(list(params.values())), []
    for batch in task.batches:
        opt.zero_grad()
        loss = family.loss(family.data, task.config, params, batch)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), params


@pytest.mark.parametrize(
    ("name", "make", "schedule"),
    [
        ("adam", lambda p, lr: torch.optim.Adam(p, lr), False),
        ("adam_cosine", lambda p, lr: torch.optim.Adam(p, lr), True),
        ("adamw", lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.01), False),
        ("sgd", lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), False),
    ],
)
def test_a_tuned_baseline_ends_as_a_loop_in_torch_at_its_rate(name, make, schedule):
    family, steps = digits((8,), batch_size=16), 15
    found = evaluate.run(
        family, {}, num_steps=steps, num_seeds=2, seed=SEED, baselines=[name], tune_seeds=2
    ).outcomes[name]
    assert found.lr == found.search.rate
    for i in range(2):
        if schedule:

            def with_cosine(p):
                opt = make(p, found.lr)
                cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
                opt.register_step_post_hook(lambda *args: cosine.step())
                return opt

            losses, params = trained_by_torch(family, with_cosine, i, steps)
        else:
            losses, params = trained_by_torch(family, lambda p: make(p, found.lr), i, steps)
        torch.testing.assert_close(found.curves.train[i], losses, rtol=1e-4, atol=1e-5)
        fresh = sample_batches(family, {}, 16, SEED, i, 3, split="test")
        held_out, right = [], []
        with torch.no_grad():
            for rows in fresh:
                x, y = family.data["x"][rows], family.data["y"][rows]
                out = F.relu(x @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]
                held_out.append(F.cross_entropy(out, y))
                right.append((out.argmax(-1) == y).double().mean())
        assert float(found.held_out_loss[i]) == pytest.approx(float(sum(held_out)) / 16, rel=1e-3)
        assert float(found.metrics["accuracy"][i]) == pytest.approx(
            float(sum(right)) / 16, abs=0.01
        )


def test_all_start_alike_and_see_the_same_batches(quadratics):
    pairs = {"a": sgd(0.1), "b": (optimizers.adam(0.1), {}), "c": sgd(0.1)}
    found = evaluate.run(quadratics, pairs, **ALONE).outcomes
    a, b, c = (found[k] for k in "abc")
    assert torch.equal(a.curves.train[:, 0], b.curves.train[:, 0])
    assert not torch.equal(a.curves.train[:, 1], b.curves.train[:, 1])
    assert torch.equal(a.curves.train, c.curves.train)
    assert torch.equal(a.held_out_loss, c.held_out_loss)


def test_curves_are_those_of_unroll_on_each_seed(quadratics):
    rule = optimizers.adam(0.1)
    found = evaluate.run(quadratics, {"a": (rule, {})}, **ALONE).outcomes["a"]
    for i in range(SEEDS):
        task = sample_task(quadratics, STEPS, SEED, i)
        shown = sample_batches(quadratics, {}, 4 * STEPS, SEED, i, split="test")
        held_out = torch.zeros(STEPS, dtype=torch.float64)
        for k in range(4):  # a point is the mean over four batches
            run = fmeta.unroll(
                rule,
                loss_of_task(quadratics),
                {},
                task.model_params,
                task.batches,
                loss_args=({},),
                eval_batches=shown[k::4],
            )
            held_out += run.eval_losses / 4
        torch.testing.assert_close(found.curves.train[i], run.losses)
        torch.testing.assert_close(found.curves.held_out[i], held_out)
        torch.testing.assert_close(found.train_loss[i], run.losses[-1])
        torch.testing.assert_close(found.metrics["distance"][i], run.params["w"].norm())


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_groups_of_seeds_change_nothing(quadratics, chunk_size):
    both = [
        evaluate.run(quadratics, {"a": sgd(0.1)}, **ALONE, chunk_size=c).outcomes["a"]
        for c in (None, chunk_size)
    ]
    for quantity in ("train_loss", "held_out_loss"):
        torch.testing.assert_close(*(getattr(o, quantity) for o in both))
    torch.testing.assert_close(*(o.curves.held_out for o in both))


def test_fewer_held_out_points_are_the_same_training(quadratics):
    all_, few = (
        evaluate.run(quadratics, {"a": sgd(0.1)}, **ALONE, held_out_points=n).outcomes["a"]
        for n in (STEPS, 3)
    )
    assert few.held_out.steps.tolist() == log_spaced(STEPS, 3)
    assert all_.held_out.steps.tolist() == list(range(1, STEPS + 1))
    torch.testing.assert_close(all_.curves.train, few.curves.train)
    torch.testing.assert_close(all_.held_out_loss, few.held_out_loss)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40, 41, 1000])
def test_points_in_log_begin_with_1_and_end_with_the_last_step(num_steps):
    at = log_spaced(num_steps, 40)
    assert at[0] == 1
    assert at[-1] == num_steps
    assert at == sorted(set(at))
    assert len(at) <= 40


def test_diverged_seeds_are_counted_and_enter_as_infinite(cliffs):
    found = evaluate.run(cliffs, {"a": sgd(0.1), "b": sgd(0.2)}, **{**ALONE, "num_seeds": 6})
    steep = [float(sample_task(cliffs, 1, SEED, i).config["scale"]) > 1 for i in range(6)]
    outcome = found.outcomes["a"]
    assert outcome.diverged.tolist() == steep
    assert 0 < sum(steep) < 6
    for values in (outcome.train_loss, outcome.held_out_loss):
        assert values.isinf().tolist() == steep
    assert outcome.metrics["distance"].isnan().tolist() == steep
    assert found.summary("a", "held_out_loss").mean == math.inf
    assert math.isnan(found.paired("a", "b", "held_out_loss").low)


def test_steps_count_to_the_final_training_loss_of_the_reference(quadratics):
    pairs = {"slow": sgd(0.02), "quick": sgd(0.2), "none": sgd(0.0)}
    found = evaluate.run(quadratics, pairs, **ALONE, reference="slow")
    level = float(found.values("slow", "train_loss").mean())
    for name in pairs:
        want = evaluate.steps_to_reach(found.outcomes[name].curves.train, level)
        assert torch.equal(found.values(name, "steps"), want)
    medians = [found.summary(name, "steps").median for name in pairs]
    assert medians[1] < medians[0] <= medians[2]


def test_without_the_reference_no_steps_are_counted(quadratics):
    found = evaluate.run(quadratics, {"a": sgd(0.1)}, **ALONE)
    assert found.reference is None
    assert found.outcomes["a"].steps is None
    assert "steps" not in found.quantities


def test_a_ratio_is_the_paired_difference_of_logarithms(quadratics):
    found = evaluate.run(quadratics, {"a": sgd(0.1), "b": sgd(0.2)}, **ALONE)
    a, b = (found.values(name, "held_out_loss") for name in "ab")
    ratio = found.paired("a", "b", "held_out_loss", log=True)
    assert ratio[:3] == pytest.approx(evaluate.paired_difference(a.log(), b.log()))
    assert found.paired("b", "a", "held_out_loss").mean == pytest.approx(float((b - a).mean()))


def test_what_is_evaluated_are_the_parameters_to_evaluate_with(quadratics):
    zero = lambda th, p, h: {k: torch.zeros_like(x) for k, x in p.items()}
    rule = optimizers.sgd(0.1)._replace(eval_params=zero)
    outcome = evaluate.run(quadratics, {"a": (rule, {})}, **ALONE).outcomes["a"]
    assert outcome.metrics["distance"].tolist() == [0.0] * SEEDS
    assert not torch.equal(outcome.curves.train[:, -1], outcome.curves.train[:, 0])


def test_a_known_rate_needs_no_search(quadratics):
    found = evaluate.run(
        quadratics,
        {"same": (optimizers.adam(0.1), {})},
        **LENGTHS,
        baselines=["adam"],
        rates={"adam": 0.1},
    ).outcomes
    assert found["adam"].search is None
    assert found["adam"].lr == 0.1
    assert torch.equal(found["adam"].curves.train, found["same"].curves.train)


def test_phases_are_told(quadratics):
    lines = []
    evaluate.run(
        quadratics, {"mine": sgd(0.1)}, **LENGTHS, baselines=["sgd"], on_phase=lines.append
    )
    assert lines == [
        "tuning SGD momentum on validation data",
        "training with mine",
        "training with SGD momentum",
    ]


@pytest.mark.parametrize("name", evaluate.BASELINES)
def test_every_baseline_has_seven_rates_and_can_be_tuned(quadratics, name):
    baseline = evaluate.BASELINES[name]
    assert len(baseline.rates) >= 7
    found = evaluate.search_rates(quadratics, baseline.build, baseline.rates, **LENGTHS)
    assert math.isfinite(min(found.scores))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_seeds": 1}, ValueError, "num_seeds must be at least 2"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"baselines": ["adm"]}, ValueError, "unknown baseline 'adm': did you mean adam"),
        ({"rates": {"adam": 0.1}}, ValueError, "rates are given for adam, which is no baseline"),
        ({"contenders": {}}, ValueError, "there is nothing to evaluate"),
        ({"contenders": {"a": optimizers.sgd()}}, TypeError, "contender 'a' must be a pair"),
        ({"contenders": {"a": (optimizers.sgd, {})}}, TypeError, "contender 'a' must be an fmeta"),
        (
            {"contenders": {"adam": sgd(0.1)}, "baselines": ["adam"]},
            ValueError,
            "adam is both a contender and a baseline",
        ),
    ],
)
def test_what_cannot_be_meant_is_an_error(quadratics, options, error, words):
    arguments = {"contenders": {"a": sgd(0.1)}, **ALONE, **options}
    with pytest.raises(error, match=words):
        evaluate.run(quadratics, **arguments)


def test_unknown_names_are_told_with_those_that_there_are(quadratics):
    found = evaluate.run(quadratics, {"a": sgd(0.1)}, **ALONE)
    with pytest.raises(ValueError, match="there is no 'b' here, but a"):
        found.values("b", "train_loss")
    with pytest.raises(ValueError, match="no 'speed' here, but train_loss, held_out_loss"):
        found.summary("a", "speed")
