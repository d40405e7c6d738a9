"""Evolution strategies: which of them are unbiased, and what their options mean."""

import pytest
import torch

import fmeta
from fmeta import estimators, optimizers, trees
from fmeta.estimators import es, es_single, nres, pes, truncated
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily, digits, mixture, sample_task
from fmeta.testing import check_estimator

DOUBLE = {"dtype": torch.float64}
START = {"a": torch.tensor([2.0], **DOUBLE), "b": torch.tensor([1.0, -1.5], **DOUBLE)}
CURVATURE = {"a": torch.tensor([1.0], **DOUBLE), "b": torch.tensor([2.0, 4.0], **DOUBLE)}
RATES = {"a": torch.tensor([0.15], **DOUBLE), "b": torch.tensor([0.1, 0.08], **DOUBLE)}


def quadratics(*, is_bad=lambda id: torch.zeros((), dtype=torch.bool)):
    """``sum h w^2 / 2``, the same in all tasks and batches; tasks are told apart by an id."""

    def loss(data, config, p, b):
        terms = trees.map(lambda w, h: (h * w.square()).sum() / 2, p, data)
        return torch.where(is_bad(config["id"]), torch.nan, terms["a"] + terms["b"])

    return TaskFamily(
        CURVATURE,
        lambda generator: {"id": torch.rand((), generator=generator, **DOUBLE)},
        lambda config, generator: START,
        lambda config, generator, steps, split="train": torch.zeros(steps),
        loss,
    )


RULE = optimizers.per_parameter_sgd(START)  # w <- (1 - r h) w, r learned


def build(make, family=None, **options):
    given = {"num_tasks": 4, "horizon": 6, "truncation": 2, "std": 1e-3, **options}
    if make is not es_single:
        given = {"stagger": False, **given}
    given = {"bind": lambda meta, config: ({"lr": meta}, None), **given}
    return make(RULE, family or quadratics(), **given)


def estimates(estimator, number, *, meta=RATES, seed=0):
    state, found = estimator.init(meta, seed), []
    for _ in range(number):
        one, state = estimator.estimate(meta, state)
        found.append(one)
    return found


def close(got, want, tol=1e-10):
    trees.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tol, atol=tol), got, want)


def gradient(horizon, truncation=None):
    """In closed form, of the mean loss; what is before a truncation is cut off if there is one.

    ``L_t = h w_t^2 / 2`` with ``w_t = (1 - r h)^(t - s) w_s``, where s begins the truncation.
    """

    def of(w, h, r):
        total = torch.zeros_like(w)
        for t in range(horizon):
            own = t if truncation is None else t % truncation
            total -= own * h**2 * w**2 * (1 - r * h) ** (2 * t - 1)
        return total / horizon

    return trees.map(of, START, CURVATURE, RATES)


def vector(tree):
    return torch.cat([x.flatten() for x in trees.leaves(tree)])


def errors_away(estimator, want, whole, *, runs=16, meta=RATES):
    """Standard errors between the mean of runs of ``whole`` estimates each, and ``want``."""
    state, means = estimator.init(meta, 0), []
    for _ in range(runs):
        total = 0
        for _ in range(whole):
            found, state = estimator.estimate(meta, state)
            total = total + vector(found.grads)
        means.append(total / whole)
    means = torch.stack(means)
    return float((means.mean(0) - vector(want)).norm() / (means.var(0) / runs).sum().sqrt())


# (horizon, truncation, estimates until trainings begin together with an estimate again)
PATTERNS = [(6, 2, 3), (5, 3, 5), (2, 5, 2)]
UNBIASED = {
    "pes": (pes, {}),
    "nres": (nres, {}),
    "es_single": (es_single, {}),
    "nres, reuse 1": (nres, {"reuse": 1}),
    "nres, reuse 3": (nres, {"reuse": 3}),
    "pes, one-sided": (pes, {"antithetic": False}),
    "nres, one-sided": (nres, {"antithetic": False}),
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_is_the_true_gradient(name, pattern):
    make, options = UNBIASED[name]
    horizon, truncation, whole = pattern
    estimator = build(make, num_tasks=40, horizon=horizon, truncation=truncation, **options)
    assert errors_away(estimator, gradient(horizon), whole) < 4


def test_the_closed_form_is_what_full_finds():
    bind = lambda meta, config: ({"lr": meta}, None)
    full = estimators.full(RULE, quadratics(), num_tasks=1, horizon=6, bind=bind)
    close(estimates(full, 1)[0].grads, gradient(6))


def test_es_has_the_bias_of_truncated_backpropagation():
    short, true = gradient(6, 2), gradient(6)
    cut = estimates(build(truncated_of), 3)
    close(vector(short), torch.stack([vector(f.grads) for f in cut]).mean(0))
    estimator = build(es, num_tasks=40)
    assert errors_away(estimator, short, 3) < 4
    assert errors_away(estimator, true, 3) > 10
    for make in (pes, nres, es_single):  # with as many estimates these see it
        assert errors_away(build(make, num_tasks=40), short, 3) > 6


def truncated_of(rule, family, *, std, **options):
    return truncated(rule, family, **options)


def test_es_is_unbiased_where_truncations_are_whole_trainings():
    estimator = build(es, num_tasks=40, horizon=3, truncation=6)
    # Two trainings under one perturbation: the gradient of their mean loss is that of each.
    assert errors_away(estimator, gradient(3), 1, runs=40) < 4


def test_staggered_nres_is_unbiased_estimate_for_estimate():
    """All phases are in each estimate, where es_single has one phase after the other."""
    estimator = build(nres, num_tasks=60, stagger=True)
    state = estimator.init(RATES, 0)
    for _ in range(3):  # the first trainings, of which some were cut short
        _, state = estimator.estimate(RATES, state)
    phases = {int(t) % 6 for t in state.t}
    assert phases == {0, 2, 4}
    lockstep = build(es_single, num_tasks=60)
    _, at = lockstep.estimate(RATES, lockstep.init(RATES, 0))
    assert set(at.t.tolist()) == {2}


# The same perturbations


def at_estimate(name):
    """``perturb`` that draws anew by estimate and particle."""

    def perturb(meta, step, i):
        generator = fold_in(name, step, i)
        return trees.map(lambda x: 0.05 * torch.randn(x.shape, generator=generator, **DOUBLE), meta)

    return perturb


@pytest.mark.parametrize("make", [nres, es_single])
def test_pieces_add_up_to_evolution_strategies_on_the_whole(make):
    pieces = estimates(build(make, perturb=at_estimate(1)), 3)
    whole = estimates(build(es, truncation=6, perturb=at_estimate(1)), 1)[0]
    for field in ("loss", "grads"):
        parts = [getattr(p, field) for p in pieces]
        close(trees.map(lambda *xs: sum(xs) / 3, *parts), getattr(whole, field))


def test_pieces_of_pes_do_not():
    pieces = estimates(build(pes, perturb=at_estimate(1)), 3)
    whole = estimates(build(es, truncation=6, perturb=at_estimate(1)), 1)[0]
    apart = sum(vector(p.grads) for p in pieces) / 3 - vector(whole.grads)
    assert apart.norm() > 0.1 * vector(whole.grads).norm()


def test_reuse_of_a_truncation_is_pes():
    def same(meta, step, i):  # what nres draws for piece step % 3 of the training
        generator = fold_in(0, step - step % 3, i, 1, 4, step % 3)
        return trees.map(lambda x: 1e-3 * torch.randn(x.shape, generator=generator, **DOUBLE), meta)

    for got, want in zip(
        estimates(build(nres, reuse=2), 7), estimates(build(pes, perturb=same), 7), strict=True
    ):
        close(got.grads, want.grads)
        close(got.metrics["losses"], want.metrics["losses"])


def test_a_perturbation_is_kept_as_long_as_the_training():
    """And drawn anew in the step of a truncation with which the next training begins."""
    found = estimates(build(nres, num_tasks=1, horizon=5, truncation=3, std=0.05), 5)
    losses = torch.cat([f.metrics["losses"][:, 0] for f in found])  # (15, 2)
    for training in losses.split(5):
        # Of one rate throughout: two coordinates would hide it, so look at one alone.
        assert training[0, 0] == training[0, 1]
        assert (training[1:, 0] != training[1:, 1]).all()
    one = quadratics()._replace(init=lambda c, g: trees.map(lambda w: w * (w == 2.0), START))
    found = estimates(build(nres, one, num_tasks=1, horizon=5, truncation=3, std=0.05), 5)
    losses = torch.cat([f.metrics["losses"][:, 0] for f in found])
    factors = []
    for training in losses.split(5):  # (1 - r)^2, the same in all steps
        ratios = training[1:] / training[:-1]
        close(ratios, ratios[:1].expand_as(ratios))
        factors.append(float(ratios[0, 0]))
    assert len(set(factors)) == 3


def noise(make, rule, truncation, horizon=12):
    """Variance of a single estimate, its mean over the phases of a training."""
    given = {"num_tasks": 4, "horizon": horizon, "truncation": truncation, "std": 1e-3}
    estimator = make(
        rule, quadratics(), **given, **({} if make is es_single else {"stagger": False})
    )
    state, rows = estimator.init(rule.init(), 0), []
    for _ in range(30):
        row = []
        for _ in range(horizon // truncation):
            found, state = estimator.estimate(rule.init(), state)
            row.append(vector(found.grads))
        rows.append(torch.stack(row))
    return float(torch.stack(rows).var(0).sum(-1).mean())


def rule_of(step):
    """A rule whose parameters are three numbers, one for each coordinate."""
    return fmeta.optimizer_from_step(
        lambda generator: trees.map(lambda w: 0.002 + 0 * w, START),
        lambda theta, p: (),
        lambda theta, p, g, h: (trees.map(step, theta, p, g), h),
    )


def test_what_noise_is_added_by_perturbations_drawn_anew():
    """To first order ``L_w = sum_v g_v eps_v``, where perturbation v is that of truncation v.

    PES weighs it by ``sum_v eps_v``, and the variance is about ``W d sum_v |g_v|^2``; with one
    perturbation throughout it is ``d |sum_v g_v|^2``. They are equal where all ``g_v`` are, and W
    times different where one counts.
    """
    lasting = rule_of(lambda rate, w, g: w - rate * g)  # each step adds its own to all later ones
    assert 0.5 < noise(pes, lasting, 1) / noise(nres, lasting, 1) < 2
    passing = rule_of(lambda position, w, g: 500 * position)  # only the last step shows
    assert noise(pes, passing, 1) > 3 * noise(nres, passing, 1)
    assert 0.5 < noise(pes, passing, 12) / noise(nres, passing, 12) < 2  # both es on the whole


# Antithetic pairs and single copies


def start_is_learned(make, meta, **options):
    """One step of no length: the loss is a function of the meta-parameters alone."""
    given = {"num_tasks": 3, "horizon": 1, "truncation": 1, **options}
    return make(optimizers.sgd(0.0), bind=lambda meta, config: ({}, meta), **given)


def function_of_start(fn):
    return quadratics()._replace(loss=lambda data, config, p, b: fn(p))


def along_axes(meta, step, i):
    """Orthogonal directions of the variance 1e-6: their mean outer product is that of the noise."""
    eps = torch.zeros(3, **DOUBLE)
    eps[i] = 1e-3 * 3**0.5
    return {"a": eps[:1], "b": eps[1:]}


@pytest.mark.parametrize("make", [es, pes, nres, es_single])
def test_pairs_are_exact_on_linear_and_quadratic_losses(make):
    slope = {"a": torch.tensor([3.0], **DOUBLE), "b": torch.tensor([-1.0, 5.0], **DOUBLE)}
    linear = function_of_start(lambda p: 7 + sum((s * p[k]).sum() for k, s in slope.items()))
    square = function_of_start(lambda p: sum((s * p[k].square()).sum() for k, s in slope.items()))
    options = {"perturb": along_axes, "std": 1e-3}
    found = estimates(start_is_learned(make, START, family=linear, **options), 1, meta=START)[0]
    close(found.grads, slope, 1e-9)
    found = estimates(start_is_learned(make, START, family=square, **options), 1, meta=START)[0]
    close(found.grads, trees.map(lambda s, w: 2 * s * w, slope, START), 1e-9)


def test_a_single_copy_counts_above_the_mean_of_the_other_particles():
    line = function_of_start(lambda p: p["a"].sum() ** 2)
    options = {"perturb": along_axes, "std": 1e-3, "antithetic": False}
    found = estimates(start_is_learned(es, START, family=line, **options), 1, meta=START)[0]
    e = 1e-3 * 3**0.5
    losses = [(2 + e) ** 2, 4.0, 4.0]
    assert found.metrics["losses"].shape == (1, 3, 1)
    # Only particle 0 moves "a", which is all the loss is of.
    above = [losses[i] - (sum(losses) - losses[i]) / 2 for i in range(3)]
    want = torch.tensor([above[0], above[1], above[2]], **DOUBLE) * e / 1e-6 / 3
    close(vector(found.grads), want, 1e-8)


def test_tasks_of_the_own_particle_are_no_baseline_and_those_that_diverge_neither():
    clean = quadratics()
    drawn = [sample_task(clean, 1, 0, 0, i, 1).config["id"] for i in range(6)]
    options = {"num_tasks": 6, "num_particles": 3, "antithetic": False, "std": 0.05}
    sound = estimates(build(es, clean, **options), 1)[0]
    broken = estimates(build(es, quadratics(is_bad=lambda id: id == drawn[1]), **options), 1)[0]
    assert broken.metrics["diverged"].tolist() == [False, True] + [False] * 4
    # Tasks of one particle are equal here, so that the mean of the particles stays the same ...
    losses = sound.metrics["losses"][..., 0]
    close(losses[:, 0], losses[:, 1])
    names = [fold_in(0, 0, i, 4) for i in range(3)]
    draw = lambda g: trees.map(lambda x: 0.05 * torch.randn(x.shape, generator=g, **DOUBLE), RATES)
    eps = [vector(draw(g)) for g in names]
    mean = losses.mean(0)[::2]  # of the particles
    count = torch.tensor([1.0, 2.0, 2.0], **DOUBLE)  # ... but not their weights
    total = 0
    for i in range(3):
        others = [j for j in range(3) if j != i]
        base = (mean[others] * count[others]).sum() / count[others].sum()
        total = total + count[i] * (mean[i] - base) * eps[i] / 0.05**2
    close(vector(broken.grads), total / 5)


# A standard deviation for each tensor


SCALES = {
    "numbers": {"a": 1e-3, "b": 4e-3},
    "tensors": {"a": torch.tensor(1e-3, **DOUBLE), "b": torch.tensor([1e-3, 5e-3], **DOUBLE)},
}


@pytest.mark.parametrize("std", SCALES.values(), ids=list(SCALES))
@pytest.mark.parametrize("make", [pes, nres, es_single])
def test_scales_by_tensor_are_unbiased(make, std):
    assert errors_away(build(make, num_tasks=40, std=std), gradient(6), 3) < 4


@pytest.mark.parametrize("make", [es, pes, nres, es_single])
def test_each_tensor_has_its_scale_and_is_divided_by_its_variance(make):
    scaled = build(make, num_tasks=1, std=SCALES["numbers"])
    found = estimates(scaled, 1)[0]
    losses = found.metrics["losses"][:, 0]
    difference = (losses[:, 0] - losses[:, 1]).mean() / 2
    name = (0, 0, 0, 4) if make in (es, pes) else (0, 0, 0, 1, 4)
    generator = fold_in(*name)
    for k, s in SCALES["numbers"].items():
        eps = s * torch.randn(RATES[k].shape, generator=generator, **DOUBLE)
        close(found.grads[k], difference * eps / s**2)


def test_a_tree_of_equal_scales_is_the_number():
    one, tree = (estimates(build(pes, std=s), 4) for s in (0.02, trees.map(lambda x: 0.02, RATES)))
    for a, b in zip(one, tree, strict=True):
        assert all(map(torch.equal, trees.leaves(a.grads), trees.leaves(b.grads)))


@pytest.mark.parametrize(
    ("std", "message"),
    [
        ({"a": 0.1, "b": 0.0}, "std must be positive and finite at path b, got 0.0"),
        ({"a": 0.1, "b": "wide"}, "std must be a number at path b, got 'wide'"),
        ({"a": torch.tensor([0.1, -1.0]), "b": 1.0}, "positive and finite at path a, got -1"),
        (-1.0, "std must be positive and finite, got -1.0"),
    ],
    ids=range(4),
)
def test_scales_that_are_none_are_refused_at_once(std, message):
    with pytest.raises(ValueError, match=message):
        build(pes, std=std)


@pytest.mark.parametrize(
    ("std", "message"),
    [
        ({"a": 0.1}, "std"),
        ({"a": 0.1, "b": torch.ones(3)}, r"std at path b has shape \(3,\), which does not"),
    ],
    ids=["missing", "shape"],
)
def test_scales_that_do_not_fit_are_refused_with_their_path(std, message):
    with pytest.raises(ValueError, match=message):
        estimates(build(nres, std=std), 1)


# What all of them keep


ALL = {
    "es": (es, {}),
    "es_single": (es_single, {}),
    "nres": (nres, {}),
    "nres, reuse": (nres, {"reuse": 3}),
    "one-sided": (pes, {"antithetic": False}),
}


@pytest.mark.parametrize("name", ALL)
def test_laws_of_estimators(name):
    make, options = ALL[name]
    horizon = estimators.log_uniform(2, 7)
    estimator = build(make, num_tasks=3, horizon=horizon, truncation=4, std=0.02, **options)
    assert "resumes" in check_estimator(estimator, RATES).held


@pytest.mark.parametrize("name", ["nres", "es_single", "nres, reuse"])
def test_check_estimator_finds_them_unbiased_and_es_not(name):
    make, options = ALL[name]
    given = {"true_gradient": gradient(6), "num_estimates": 3, "num_seeds": 12}
    report = check_estimator(
        build(make, num_tasks=30, **options), RATES, laws=["unbiased"], max_errors=4.0, **given
    )
    assert report.held
    with pytest.raises(AssertionError, match="law unbiased"):
        check_estimator(build(es, num_tasks=30), RATES, laws=["unbiased"], max_errors=4.0, **given)


@pytest.mark.parametrize("name", ALL)
def test_a_task_does_not_depend_on_how_many_there_are(name):
    make, options = ALL[name]
    few, many = (estimates(build(make, num_tasks=n, horizon=(3, 5), **options), 5) for n in (2, 5))
    for a, b in zip(few, many, strict=True):
        close(b.metrics["losses"][:, :2], a.metrics["losses"])


@pytest.mark.parametrize("options", [{"chunk_size": 3}, {"trace": False}], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_ways_to_compute_it_change_nothing(name, options):
    make, own = ALL[name]
    given = {"horizon": 5, "truncation": 3, **own}
    pairs = zip(
        estimates(build(make, **given), 4),
        estimates(build(make, **given, **options), 4),
        strict=True,
    )
    for a, b in pairs:
        close(a.grads, b.grads, 1e-9)


@pytest.mark.parametrize("make", [nres, es_single])
def test_tasks_of_a_particle_share_its_perturbation_to_the_end(make):
    options = {"num_tasks": 6, "num_particles": 3, "horizon": (3, 5, 9), "std": 0.05}
    if make is nres:
        options["stagger"] = True
    for found in estimates(build(make, **options), 8):
        losses = found.metrics["losses"]  # tasks differ in nothing else
        close(losses[:, ::2], losses[:, 1::2])


def test_es_single_keeps_all_trainings_in_step():
    horizon = estimators.log_uniform(2, 9)
    seen = {}
    for make in (es_single, nres):
        state = (estimator := build(make, horizon=horizon)).init(RATES, 0)
        seen[make] = []
        for _ in range(10):
            _, state = estimator.estimate(RATES, state)
            seen[make].append((set(state.t.tolist()), set(state.horizon.tolist())))
    assert all(len(t) == len(h) == 1 for t, h in seen[es_single])
    assert len({min(h) for _, h in seen[es_single]}) > 2
    assert any(len(t) > 1 for t, _ in seen[nres])


def test_a_task_that_diverges_is_left_out_and_begun_anew_with_another_perturbation():
    bad = sample_task(quadratics(), 1, 0, 0, 1, 1).config["id"]
    first, second = estimates(build(nres, quadratics(is_bad=lambda id: id == bad)), 2)
    assert first.metrics["diverged"].tolist() == [False, True, False, False]
    assert second.metrics["drawn"][:, 1].tolist() == [0, 1, 0, 0]
    assert not second.metrics["diverged"].any()
    assert all(g.isfinite().all() for g in trees.leaves((first.grads, second.grads)))


def test_mixtures_of_structures_and_learned_rules():
    rule = optimizers.linear()
    family = mixture([digits((4,), batch_size=4), digits((4, 4), batch_size=4)])
    for make in (es, nres, es_single):
        estimator = make(rule, family, num_tasks=4, horizon=4, truncation=2)
        found = estimates(estimator, 3, meta=rule.init())[-1]
        assert found.metrics["family"].tolist() == [0, 0, 1, 1]
        assert not found.metrics["diverged"].any()


@pytest.mark.parametrize("make", [es, es_single, nres, pes])
def test_compiling_what_is_not_recorded_is_refused(make):
    with pytest.raises(ValueError, match=r"compile=True.*trace=True"):
        build(make, trace=False, compile=True)


def test_wrong_reuse_is_refused():
    with pytest.raises(ValueError, match="reuse must be at least 1, got 0"):
        build(nres, reuse=0)
    with pytest.raises(ValueError, match="perturb goes without reuse"):
        build(nres, reuse=2, perturb=at_estimate(0))


def test_the_learned_rate_of_a_builder_and_its_own_scale():
    """`fmeta.learn` with a scale for each hyper-parameter: its log-rate and its momentum."""
    rule = fmeta.learn(optimizers.sgd, {"lr": "log", "momentum": "logit"}, lr=0.05, momentum=0.5)
    meta = trees.cast(rule.init(), torch.float64)
    estimator = pes(
        rule, quadratics(), num_tasks=4, horizon=6, truncation=2, std={"lr": 0.1, "momentum": 0.01}
    )
    _, state = estimator.estimate(meta, estimator.init(meta, 0))
    assert float(state.xi["lr"].abs().mean()) > 3 * float(state.xi["momentum"].abs().mean())
