"""`implicit` against an exact solve of another program, closed forms, and `full` at length."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fmeta
from fmeta import estimators, optimizers, trees
from fmeta._live_bytes import LiveBytes
from fmeta.tasks import TaskFamily, digits, logistic_regression, mixture, quadratic, sample_task
from fmeta.testing import check_estimator

DOUBLE = torch.float64
DATA = np.load(Path(__file__).parents[1] / "reference" / "meta_gradient.npz")
SOLVERS = {
    "cg": {"num_iterations": 20},
    "neumann": {"num_iterations": 200, "step_size": 0.3},
    "exact": {},
}


def options_of(solver):
    return {"solver": solver, **SOLVERS[solver]}


def first(estimator, meta, seed=3):
    return estimator.estimate(meta, estimator.init(meta, seed))[0]


def close(got, want, tol=1e-8):
    """Relative to the largest entry of each leaf."""
    assert trees.paths(got) == trees.paths(want)
    for path, a, b in zip(trees.paths(want), trees.leaves(got), trees.leaves(want), strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(
            a, b, rtol=0, atol=tol * scale, msg=lambda m, p=path: f"{p}: {m}"
        )


def double(family):
    """The family in float64."""

    def cast(fn):
        return lambda *args, **options: trees.cast(fn(*args, **options), DOUBLE)

    return family._replace(
        data=trees.cast(family.data, DOUBLE),
        sample=cast(family.sample),
        init=cast(family.init),
        batches=cast(family.batches),
    )


def no_rule(meta, config):
    return {}, None


# The exact solves of an independent program


def array(key):
    return torch.from_numpy(np.asarray(DATA[key]))


def of_one_problem(train, validation):
    """A family of one task; a batch says by its number which of two losses of ``p`` it means."""
    return TaskFamily(
        (),
        lambda generator: {},
        lambda config, generator: torch.zeros(6, dtype=DOUBLE),
        lambda config, generator, steps, split="train": torch.full((steps,), split == "train"),
        lambda data, config, p, batch: torch.where(batch, train(p), validation(p)),
    )


def reference_quadratic():
    a, b, c, e = (array(f"imaml_quad/{k}") for k in ("A", "b", "C", "e"))
    return of_one_problem(lambda p: p @ a @ p / 2 - b @ p, lambda p: p @ c @ p / 2 - e @ p)


def reference_logistic():
    x, xv = (array(f"imaml_logistic/x_{k}") for k in ("train", "val"))
    y, yv = (array(f"imaml_logistic/y_{k}").double() for k in ("train", "val"))
    return of_one_problem(
        lambda p: F.binary_cross_entropy_with_logits(x @ p, y),
        lambda p: F.binary_cross_entropy_with_logits(xv @ p, yv),
    )


REFERENCES = {"imaml_quad": reference_quadratic, "imaml_logistic": reference_logistic}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", REFERENCES)
def test_the_reference_from_its_own_training(case, solver):
    """Start and proximal weight, both learned; training finds the optimum that it is about."""
    family, lam = REFERENCES[case](), array(f"{case}/lam")
    options = {
        "num_tasks": 2,
        "horizon": 80,
        "eval_split": "validation",
        "inner_batches": 1,
        "outer_batches": 1,
        **options_of(solver),
    }
    sgd = optimizers.sgd(0.2)

    def near(data, config, p, batch, meta):
        pull = meta["lam"] / 2 * (p - meta["theta"]).square().sum()
        return family.loss(data, config, p, batch) + pull

    both = {"theta": array(f"{case}/theta"), "lam": lam}
    got = first(estimators.implicit(sgd, family, inner_loss=near, **options), both)
    want = {"theta": array(f"{case}/meta_grad"), "lam": array(f"{case}/grad_lam")}
    close(got.grads, want)
    close(got.loss, array(f"{case}/val_loss"))
    assert got.metrics["slope"].max() < 1e-9
    assert got.metrics["residual"].max() < 1e-9
    alone = estimators.implicit(sgd, family, proximal=float(lam), **options)
    close(first(alone, both["theta"]).grads, want["theta"])


# Closed forms

CURVATURE = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)


def bowls():
    """``sum a (p - c)^2 / 2`` with an optimum c of each task's own."""

    def draw(generator):
        return torch.randn(3, generator=generator, dtype=DOUBLE)

    return TaskFamily(
        CURVATURE,
        lambda generator: {"c": draw(generator)},
        lambda config, generator: draw(generator),
        lambda config, generator, steps, split="train": torch.zeros(steps),
        lambda a, config, p, batch: (a * (p - config["c"]).square()).sum() / 2,
    )


BOWLS = bowls()
START = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)


def of_bowls(**options):
    arguments = {"num_tasks": 3, "horizon": 60, "inner_batches": 1, **options}
    return estimators.implicit(optimizers.sgd(0.3), BOWLS, **arguments)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_quadratic_with_a_learned_start(solver):
    """The optimum is the mean of start and c, by lambda and a; in the mean over tasks c is 0."""
    lam, a = 1.5, CURVATURE
    got = first(of_bowls(proximal=lam, **options_of(solver)), START)
    c = torch.stack([sample_task(BOWLS, 1, 3, 0, i).config["c"] for i in range(3)])
    optimum = (a * c + lam * START) / (a + lam)
    close(got.grads, (lam / (a + lam) * a * (optimum - c)).mean(0))
    close(got.loss, (a * (optimum - c).square()).sum(1).mean() / 2)


def test_laws():
    lam, a = 1.5, CURVATURE
    estimator = of_bowls(proximal=lam, horizon=40)
    true = a * (lam / (a + lam)).square() * START
    report = check_estimator(estimator, START, true_gradient=true, num_seeds=24)
    assert len(report.held) == 7


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_too_short_a_training_is_credited_with_the_whole_way(steps):
    """Its known bias: where training has gone a share of the way, `full` counts that share."""
    inner = lambda a, config, p, batch, meta: (a * (p - meta).square()).sum() / 2
    outer = lambda a, config, p, batch, meta: (p - config["c"]).square().sum() / 2
    family = BOWLS._replace(loss=lambda a, config, p, b: outer(a, config, p, b, None))
    options = {"num_tasks": 2, "horizon": steps, "inner_loss": inner, "eval_split": "validation"}
    sgd = optimizers.sgd(0.3)
    last = lambda run: run.eval_losses[-1]
    exact = first(estimators.full(sgd, family, bind=no_rule, meta_loss=last, **options), START)
    got = first(estimators.implicit(sgd, family, **options), START)
    close(got.loss, exact.loss)
    share = 1 - (1 - 0.3 * CURVATURE) ** steps
    close(exact.grads, share * got.grads)
    assert (got.grads - exact.grads).norm() > 0.02 * exact.grads.norm()
    assert got.metrics["slope"].min() > 1e-3  # which tells


@pytest.mark.parametrize("count", [None, 1, 5, 40])
def test_the_inner_problem_is_the_mean_over_the_last_batches(count):
    """Batches with a curvature of their own, more of them than are worked on together."""
    steps, lam = 70, 0.7
    family = TaskFamily(
        (),
        lambda generator: {},
        lambda config, generator: torch.zeros((), dtype=DOUBLE),
        lambda config, generator, steps, split="train": (
            torch.rand(steps, generator=generator, dtype=DOUBLE) + (split == "validation")
        ),
        lambda data, config, p, b: b * (p - 1) ** 2 / 2,
    )
    estimator = estimators.implicit(
        optimizers.sgd(0.2),
        family,
        num_tasks=1,
        horizon=steps,
        proximal=lam,
        eval_split="validation",
        inner_batches=count,
        outer_batches=count,
    )
    theta = torch.tensor(-1.0, dtype=DOUBLE)
    got = first(estimator, theta)
    task = sample_task(family, steps, 3, 0, 0)
    judged = sample_task(family, steps, 3, 0, 0, split="validation").batches
    p = theta
    for b in task.batches:
        p = p - 0.2 * (b * (p - 1) + lam * (p - theta))
    h, weight = task.batches[-(count or steps) :].mean(), judged[-(count or steps) :].mean()
    close(got.loss, weight * (p - 1) ** 2 / 2)
    close(got.grads, lam / (h + lam) * weight * (p - 1))
    close(got.metrics["slope"][0], (h * (p - 1) + lam * (p - theta)).abs())


# A long and complete training

LOGISTIC = double(logistic_regression(dim=3, points=20, weight_decay=0.0))
DECAYS = {"w": torch.tensor(-1.0, dtype=DOUBLE), "b": torch.tensor(0.0, dtype=DOUBLE)}
LEARNED = {"decay": DECAYS, "start": {k: torch.full_like(v, 0.3) for k, v in DECAYS.items()}}
LEARNED["start"]["w"] = torch.tensor([0.3, -0.2, 0.1], dtype=DOUBLE)


def decayed(data, config, p, batch, meta):
    decays = [meta["decay"][k].exp() / 2 * p[k].square().sum() for k in p]
    return LOGISTIC.loss(data, config, p, batch) + sum(decays)


def decayed_and_near(data, config, p, batch, meta):
    apart = [(p[k] - meta["start"][k]).square().sum() for k in p]
    return decayed(data, config, p, batch, meta) + 0.4 / 2 * sum(apart)


@pytest.fixture(scope="module")
def by_full():
    """Through 150 steps, proximal or not."""

    def of(inner_loss, bind, meta):
        estimator = estimators.full(
            optimizers.sgd(0.4),
            LOGISTIC,
            num_tasks=3,
            horizon=150,
            inner_loss=inner_loss,
            bind=bind,
            eval_split="validation",
            meta_loss=lambda run: run.eval_losses[-1],
        )
        return first(estimator, meta)

    return {
        False: of(decayed, no_rule, {"decay": DECAYS}),
        True: of(decayed_and_near, lambda meta, config: ({}, meta["start"]), LEARNED),
    }


@pytest.mark.parametrize("proximal", [False, True], ids=["not proximal", "proximal"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_full_at_length(by_full, solver, proximal):
    meta = LEARNED if proximal else {"decay": DECAYS}
    estimator = estimators.implicit(
        optimizers.sgd(0.4),
        LOGISTIC,
        num_tasks=3,
        horizon=150,
        inner_loss=decayed,
        proximal=0.4 if proximal else None,
        bind=(lambda meta, config: ({}, meta["start"])) if proximal else None,
        eval_split="validation",
        inner_batches=1,
        outer_batches=1,
        **options_of(solver),
    )
    got, want = first(estimator, meta), by_full[proximal]
    close(got.loss, want.loss)
    close(got.grads, want.grads)
    for name in ("losses", "drawn", "diverged", "diverged_at"):
        torch.testing.assert_close(got.metrics[name], want.metrics[name])


# Tasks side by side


def test_vmap_over_tasks_is_a_loop():
    options = {"horizon": 30, "inner_loss": decayed, "eval_split": "validation"}
    adam, meta = optimizers.adam(0.1), {"decay": DECAYS}
    estimator = estimators.implicit(adam, LOGISTIC, num_tasks=3, **options)
    got = first(estimator, meta)
    found = []
    for i in range(3):
        config, params, batches = sample_task(LOGISTIC, 30, 3, 0, i)
        judged = sample_task(LOGISTIC, 30, 3, 0, i, split="validation").batches
        loss = lambda p, b, c: decayed((), c, p, b, meta)
        run = fmeta.unroll(adam, loss, {}, params, batches, loss_args=(config,))
        found.append(
            fmeta.implicit_gradient(
                lambda p, m, c=config, bs=batches: sum(decayed((), c, p, b, m) for b in bs) / 30,
                lambda p, m, c=config, bs=judged: sum(LOGISTIC.loss((), c, p, b) for b in bs) / 30,
                run.params,
                meta,
            )
        )
    close(got.grads, trees.map(lambda *xs: torch.stack(xs).mean(0), *[f.grads for f in found]))
    for name in ("residual", "slope"):
        want = torch.stack([getattr(f, name) for f in found])
        torch.testing.assert_close(got.metrics[name], want, rtol=1e-6, atol=1e-10)
    chunked = first(estimators.implicit(adam, LOGISTIC, num_tasks=3, chunk_size=2, **options), meta)
    close(chunked.grads, got.grads)


def test_a_mixture_and_what_only_one_of_its_families_reads():
    """A start for each; rows of the further metrics for all tasks."""
    families = mixture([double(quadratic(4, 3.0)), double(quadratic(2, 3.0))], weights=(2, 1))
    meta = {"4": torch.ones(4, dtype=DOUBLE), "2": torch.ones(2, dtype=DOUBLE)}
    bind = lambda meta, config: ({}, {"x": meta[str(len(config["c"]))]})
    estimator = estimators.implicit(
        optimizers.sgd(0.3), families, num_tasks=3, horizon=30, proximal=1.0, bind=bind
    )
    got = first(estimator, meta)
    assert got.metrics["family"].tolist() == [0, 0, 1]
    assert got.metrics["slope"].shape == got.metrics["residual"].shape == (3,)
    assert all(bool(g.abs().min() > 0) for g in got.grads.values())
    check_estimator(estimator, meta, laws=["state_is_data", "resumes", "metrics_named"])


def test_a_task_that_diverges_is_left_out():
    worst = sample_task(BOWLS, 1, 3, 0, 1).config["c"][0]

    def inner(a, config, p, batch, meta):
        value = BOWLS.loss(a, config, p, batch) + (p - meta).square().sum() / 2
        return torch.where(config["c"][0] == worst, torch.nan, value)

    got = first(of_bowls(inner_loss=inner), START)
    assert got.metrics["diverged"].tolist() == [False, True, False]
    assert got.metrics["diverged_at"].tolist() == [-1, 0, -1]
    assert got.grads.isfinite().all()


def test_memory_does_not_grow_with_the_horizon():
    """Where that of `full` does, on the same batches of digits."""
    family = digits((8,), batch_size=32)
    log_decay = torch.tensor(-3.0)

    def loss(data, config, p, batch, log_decay):
        penalty = log_decay.exp() / 2 * sum(x.square().sum() for x in p.values())
        return family.loss(data, config, p, batch) + penalty

    peaks = {}
    for build in (estimators.full, estimators.implicit):
        for steps in (36, 108):
            options = {"inner_loss": loss, "eval_split": "validation", "bind": no_rule}
            estimator = build(optimizers.sgd(0.1), family, num_tasks=2, horizon=steps, **options)
            state = estimator.init(log_decay, 0)
            with LiveBytes() as count:
                estimator.estimate(log_decay, state)
            peaks[build.__name__, steps] = count.peak
    assert peaks["full", 108] > 2 * peaks["full", 36]
    assert peaks["implicit", 108] < 1.2 * peaks["implicit", 36]


# Rules


def test_averaged_parameters_are_the_end_point():
    rule = fmeta.optimizers.schedule_free_adamw(0.05)
    options = {"num_tasks": 1, "horizon": 20, "proximal": 1.0}
    got = first(estimators.implicit(rule, BOWLS, **options), START)
    task = sample_task(BOWLS, 20, 3, 0, 0)

    def loss(p, batch, config):
        return BOWLS.loss(CURVATURE, config, p, batch) + (p - START).square().sum() / 2

    run = fmeta.unroll(rule, loss, {}, START, task.batches, loss_args=(task.config,))
    end = rule.eval_params({}, run.params, run.hidden)
    assert (end - run.params).norm() > 1e-3
    close(got.loss, BOWLS.loss(CURVATURE, task.config, end, None))


def test_a_chain_without_parameters_needs_no_bind():
    family = fmeta.tasks.quadratic(dim=4, condition=4.0)
    start = {"x": torch.zeros(4)}
    sgd = fmeta.optimizers.sgd(0.5)
    found = []
    for rule in (sgd, fmeta.chain(fmeta.clip_by_global_norm(100.0), sgd)):
        estimator = estimators.implicit(rule, family, num_tasks=2, horizon=5, proximal=1.0)
        found.append(estimator.estimate(start, estimator.init(start, 0))[0].grads["x"])
    torch.testing.assert_close(*found)


def test_a_learned_rule_is_constant_and_its_needs_are_given():
    """Parameters of the rule by `bind`; a need that the family's extras give."""
    sgd = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.3)

    def update(opt_params, params, grads, hidden, *, loss=None, extras=None):
        return sgd.update(
            opt_params, params, trees.map(lambda g: g * extras["scale"], grads), hidden
        )

    rule = sgd._replace(update=update, needs=frozenset({"scale"}))
    family = BOWLS._replace(extras=lambda a, config, p, batch: {"scale": torch.ones(())})
    theta = trees.cast(sgd.init(), DOUBLE)
    bind = lambda meta, config: (theta, meta)
    options = {"num_tasks": 3, "horizon": 60, "inner_batches": 1, "proximal": 1.5}
    got = first(estimators.implicit(rule, family, bind=bind, **options), START)
    close(got.grads, first(of_bowls(proximal=1.5), START).grads, 1e-6)


# What cannot be meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proximal": None}, "nothing that is learned moves the optimum.*inner_loss.*proximal="),
        ({"proximal": 0.0}, "proximal must be positive"),
        ({"solver": "lu"}, "solver must be one of cg, neumann, exact"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"inner_batches": 0}, "inner_batches must be at least 1"),
        ({"outer_batches": 200}, "outer_batches is 200, but training has 60"),
    ],
    ids=str,
)
def test_it_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        of_bowls(**{"proximal": 1.0, **options})


def test_rates_of_the_rule_are_refused_by_path_with_the_cure():
    rule = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.1)
    meta = {"rule": trees.cast(rule.init(), DOUBLE), "start": START}
    bind = lambda meta, config: (meta["rule"], meta["start"])
    estimator = estimators.implicit(rule, BOWLS, num_tasks=1, horizon=2, proximal=1.0, bind=bind)
    message = r"does not depend on the meta-parameter at path rule/lr.*keep it constant.*full"
    with pytest.raises(ValueError, match=message):
        estimator.init(meta, 0)


def test_parameters_of_the_rule_without_a_bind_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"parameters of its own.*bind=lambda"):
        estimators.implicit(optimizers.linear(), BOWLS, num_tasks=1, horizon=2, proximal=1.0)


def test_meta_training_with_it_learns_a_start():
    """Towards the mean of the optima, which is 0."""
    outer = optimizers.adam(0.2)
    found = fmeta.meta_train.run(
        of_bowls(proximal=1.0, horizon=20), START, outer=outer, num_steps=40
    )
    assert found.meta_params.norm() < 0.4 * START.norm()


@pytest.mark.parametrize("solver", SOLVERS)
def test_on_another_device(solver):
    family = LOGISTIC._replace(data=torch.zeros((), device="meta"))
    meta = trees.map(lambda x: x.to("meta"), {"decay": DECAYS})
    options = {"inner_loss": decayed, "eval_split": "validation", "solver": solver}
    got = first(
        estimators.implicit(optimizers.sgd(0.4), family, num_tasks=2, horizon=3, **options), meta
    )
    assert {x.device.type for x in trees.leaves((got.loss, got.grads))} == {"meta"}
    assert got.metrics["slope"].device.type == "meta"


def test_a_start_without_a_proximal_term_is_refused_and_so_is_a_constant_of_the_loss():
    bind = lambda meta, config: ({}, meta["start"])
    meta = {"start": START, "m": START + 1}
    reads_m = lambda a, config, p, batch, meta: (p - meta["m"]).square().sum()
    with pytest.raises(ValueError, match=r"path start.*proximal="):
        of_bowls(inner_loss=reads_m, bind=bind).init(meta, 0)
    adds_m = lambda a, config, p, batch, meta: p.square().sum() + meta["m"].sum()
    with pytest.raises(ValueError, match="at path m"):
        of_bowls(inner_loss=adds_m, bind=bind, proximal=1.0).init(meta, 0)


# A loss that is learned, in the estimators of whole trainings


def test_full_and_forward_learn_a_loss():
    options = {"num_tasks": 2, "horizon": 6, "inner_loss": decayed, "eval_split": "validation"}
    adam, meta = optimizers.adam(0.1), {"decay": DECAYS}
    both = [
        first(build(adam, LOGISTIC, bind=no_rule, **options), meta)
        for build in (estimators.full, estimators.forward)
    ]
    close(both[1].grads, both[0].grads)

    def by_hand(meta, i):
        config, params, batches = sample_task(LOGISTIC, 6, 3, 0, i)
        judged = sample_task(LOGISTIC, 6, 3, 0, i, split="validation").batches
        run = fmeta.unroll(
            adam,
            lambda p, b, meta: decayed((), config, p, b, meta),
            {},
            params,
            batches,
            loss_args=(meta,),
            eval_batches=judged,
            eval_loss_fn=lambda p, b, meta: LOGISTIC.loss((), config, p, b),
        )
        return run.eval_losses.mean()

    grads, loss = torch.func.grad_and_value(lambda m: (by_hand(m, 0) + by_hand(m, 1)) / 2)(meta)
    close(both[0].grads, grads)
    close(both[0].loss, loss)


def test_a_learned_loss_is_not_judged_by_itself():
    options = {"num_tasks": 2, "horizon": 6, "inner_loss": decayed}
    with pytest.raises(ValueError, match=r"judged by itself.*eval_split"):
        estimators.full(optimizers.adam(0.1), LOGISTIC, **options)
    with pytest.raises(ValueError, match="leave out truncation"):
        estimators.forward(
            optimizers.adam(0.1), LOGISTIC, eval_split="validation", truncation=2, **options
        )
