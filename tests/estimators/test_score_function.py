"""REINFORCE over steps: its mean against closed forms, its noise, and what its draws depend on."""

import math

import numpy as np
import pytest
import torch
from torch.func import grad, jacrev

import fmeta
from fmeta import optimizers, trees
from fmeta.estimators import full, score_function
from fmeta.estimators._normalized import normalized
from fmeta.estimators._return_baselines import BASELINES, returns_to_go
from fmeta.optimizer import optimizer_from_step
from fmeta.tasks import TaskFamily, digits, mixture
from fmeta.testing import ESTIMATOR_LAWS, check_estimator

DOUBLE = {"dtype": torch.float64}
START = torch.tensor([2.0, -1.0, 0.5], **DOUBLE)
CURVATURE = torch.tensor([1.0, 3.0, 9.0], **DOUBLE)
RULE = fmeta.learn(optimizers.sgd, {"lr": "linear"}, lr=0.08)
HEAVY = fmeta.learn(optimizers.sgd, {"lr": "linear", "momentum": "linear"}, lr=0.04, momentum=0.5)
META, HEAVY_META = (trees.cast(rule.init(), torch.float64) for rule in (RULE, HEAVY))
GENTLE = {"lr": torch.tensor(0.02, **DOUBLE)}  # for random curvatures
STEPS, STD = 5, 0.3
MANY = {"num_tasks": 10, "num_rollouts": 40}  # trainings of one task, so all are alike


def quadratics(random=False, is_bad=lambda id: id < 0):
    """``k sum(curvature (w - b)^2) / 2``; without ``random`` nothing but noise in steps is."""

    def draw(generator, *shape):
        return random * torch.randn(*shape, generator=generator, **DOUBLE)

    def batches(config, generator, steps, split="train"):
        return 0.3 * draw(generator, steps, 3) + (1.0 if split == "validation" else 0.0)

    def loss(data, config, p, b):
        value = config["k"] * (data * (p["w"] - b).square()).sum() / 2
        return torch.where(is_bad(config["id"]), torch.nan, value)

    return TaskFamily(
        CURVATURE,
        lambda g: {"k": 1 + draw(g, 1)[0].abs(), "id": torch.rand((), generator=g, **DOUBLE)},
        lambda config, g: {"w": START + draw(g, 3)},
        batches,
        loss,
    )


def build(family=None, *, rule=RULE, **options):
    given = {"num_tasks": 4, "horizon": STEPS, "std": STD, **options}
    return score_function(rule, family or quadratics(), **given)


def expected_losses(lr, momentum=0.0, std=STD, steps=STEPS):
    """Of trainings with noise: mean and covariance of (error, momentum buffer) in closed form.

    ``lr``: a number for each step, ``(steps,)``. The buffer is that of `optimizers.sgd`: the
    gradient is added to momentum times the buffer.
    """
    h, zero = CURVATURE, torch.zeros_like(CURVATURE)
    mean = torch.stack([START, zero], -1)
    cov = torch.zeros(3, 2, 2, **DOUBLE)
    losses = []
    for t in range(steps):
        losses.append((h * (mean[:, 0].square() + cov[:, 0, 0])).sum() / 2)
        buffer = torch.stack([h, zero + momentum], -1)
        error = torch.stack([zero + 1, zero], -1) - lr[t] * buffer
        step = torch.stack([error, buffer], -2)
        mean = (step @ mean[..., None])[..., 0]
        cov = step @ cov @ step.mT
        added = torch.zeros(2, 2, **DOUBLE)
        added[0, 0] = 1.0
        cov = cov + std**2 * added
    return torch.stack(losses)


def true_gradient(of=lambda lr: expected_losses(lr.expand(STEPS)).mean(), at=META["lr"]):
    return grad(of)(at).reshape(1)


def vector(tree):
    return torch.cat([x.reshape(-1) for x in trees.leaves(tree)])


def draws(estimator, number=40, *, meta=META, seed=0, skip=1):
    """Gradients of estimates in a row, without the first: ``(number, meta-parameters)``."""
    state, found = estimator.init(meta, seed), []
    for _ in range(skip + number):
        one, state = estimator.estimate(meta, state)
        found.append(vector(one.grads))
    return torch.stack(found[skip:])


def errors_away(found, want):
    return float((found.mean(0) - want).norm() / (found.var(0) / len(found)).sum().sqrt())


def estimates(estimator, number, *, meta=META, seed=0):
    state, found = estimator.init(meta, seed), []
    for _ in range(number):
        one, state = estimator.estimate(meta, state)
        found.append(one)
    return found


def close(got, want, tol=1e-10):
    trees.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tol, atol=tol), got, want)


# The mean


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("recurrent", [False, True])
def test_its_mean_is_the_gradient_of_the_expected_loss(baseline, recurrent):
    estimator = build(baseline=baseline, recurrent=recurrent, **MANY)
    found = draws(estimator)
    want = true_gradient()
    assert errors_away(found, want) < 4
    assert errors_away(found, 0 * want) > 8  # so the noise is small enough to tell


def test_the_first_estimate_is_unbiased_too():
    # Where nothing has been learned, the other trainings are the baseline.
    for baseline in ("moving", "learned", "fitted_rollouts"):
        estimator = build(baseline=baseline, **MANY)
        found = torch.cat([draws(estimator, 1, seed=s, skip=0) for s in range(40)])
        assert errors_away(found, true_gradient()) < 4


def test_its_loss_is_that_of_trainings_with_noise():
    found = torch.stack([e.loss for e in estimates(build(**MANY), 20)])
    want = expected_losses(META["lr"].expand(STEPS)).mean()
    assert abs(found.mean() - want) < 4 * found.std() / 20**0.5
    assert want > 1.02 * expected_losses(META["lr"].expand(STEPS), std=0.0).mean()


def test_a_hidden_state_that_depends_on_what_is_learned():
    """A learned momentum: exact through hidden states, biased where they are constants."""
    want = vector(
        grad(lambda m: expected_losses(m["lr"].expand(STEPS), m["momentum"]).mean())(HEAVY_META)
    )
    options = {"rule": HEAVY, "baseline": "rollouts", **MANY}
    whole = draws(build(recurrent=True, **options), meta=HEAVY_META)
    cut = draws(build(recurrent=False, **options), meta=HEAVY_META)
    assert errors_away(whole, want) < 4
    assert errors_away(cut[:, 1:], want[1:]) > 5


@pytest.mark.parametrize("discount", [0.0, 0.6])
def test_the_mean_with_a_discount(discount):
    """Each step is held responsible for later losses, each of them with its discount."""
    effect = jacrev(expected_losses)(META["lr"].expand(STEPS))  # of rate t on loss s: [s, t]
    want = (
        sum(discount ** (s - t - 1) * effect[s, t] for s in range(STEPS) for t in range(s)) / STEPS
    )
    found = draws(build(discount=discount, baseline="rollouts", **MANY))
    assert errors_away(found, want) < 4
    assert errors_away(found, true_gradient()) > 8


def test_a_deviation_for_each_coordinate():
    std = torch.tensor([0.5, 0.1, 0.05], **DOUBLE)
    found = draws(build(std={"w": std}, baseline="moving", **MANY))
    h = CURVATURE

    def loss(lr):
        shrink = (1 - lr * h).square()
        values = []
        for s in range(STEPS):
            noise = std.square() * sum((shrink**k for k in range(s)), torch.zeros(3, **DOUBLE))
            values.append((h * (shrink**s * START.square() + noise)).sum() / 2)
        return torch.stack(values).mean()

    assert errors_away(found, true_gradient(loss)) < 4


def test_a_learned_deviation():
    meta = {"rule": META, "log_std": torch.tensor(math.log(STD), **DOUBLE)}

    def of(meta):
        lr = meta["rule"]["lr"].expand(STEPS)
        return expected_losses(lr, std=meta["log_std"].exp()).mean()

    estimator = build(
        std=lambda meta, config: meta["log_std"].exp(),
        bind=lambda meta, config: (meta["rule"], None),
        baseline="moving",
        **MANY,
    )
    found = draws(estimator, 60, meta=meta)
    want = vector(grad(of)(meta))
    apart = (found.mean(0) - want) / (found.var(0) / len(found)).sqrt()
    assert apart.abs().max() < 4
    assert want[0] > 0  # less noise is better


def test_a_relative_deviation_is_held_fixed():
    mean = META["lr"] * CURVATURE * START  # the first step, but for its sign
    std = 0.5 * mean.square().mean().sqrt()

    def of(lr):
        return expected_losses(lr.expand(2), std=std, steps=2).mean()

    found = draws(build(horizon=2, std=0.5, relative=True, baseline="moving", **MANY))
    assert errors_away(found, true_gradient(of)) < 4
    moves = lambda lr: expected_losses(
        lr.expand(2), std=0.5 * lr * (CURVATURE * START).square().mean().sqrt(), steps=2
    ).mean()
    assert errors_away(found, true_gradient(moves)) > 4


def test_a_loss_without_any_derivative():
    """A rule that adds a number; the loss counts whether a threshold is passed."""
    drift = optimizer_from_step(
        lambda g: torch.tensor(0.2, **DOUBLE), lambda th, p: {}, lambda th, p, g, h: (p + th, h)
    )
    family = TaskFamily(
        (),
        lambda g: {"c": torch.tensor(0.5, **DOUBLE)},
        lambda config, g: torch.zeros((), **DOUBLE),
        lambda config, g, steps, split="train": torch.zeros(steps),
        lambda data, config, p, b: (p < config["c"]).to(p.dtype),
    )
    meta = drift.init()
    estimator = score_function(drift, family, horizon=2, std=0.4, **MANY)
    found = draws(estimator, meta=meta)
    # Of the two losses the second counts: P(0.2 + 0.4 z < 0.5).
    x = (0.5 - 0.2) / 0.4
    want = torch.tensor([-math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) / 0.4 / 2], **DOUBLE)
    assert errors_away(found, want) < 4
    exact = full(drift, family, num_tasks=1, horizon=2)
    assert vector(exact.estimate(meta, exact.init(meta, 0))[0].grads) == 0


def test_losses_after_the_step_count_from_the_step_itself_on():
    """With evaluation, the one step of a training has an effect; without, none."""
    for split in (None, "train"):
        found = draws(build(horizon=1, eval_split=split, baseline="moving", **MANY), 20)
        if split is None:
            assert not found.any()
        else:
            of = lambda lr: expected_losses(lr.expand(2), steps=2)[1]
            assert errors_away(found, true_gradient(of)) < 4


def test_values_are_what_the_meta_loss_makes_of_losses():
    last = lambda losses, evals, t, horizon: torch.where(t == horizon - 1, losses, 0.0)
    found = draws(build(meta_loss=last, **MANY))
    want = true_gradient(lambda lr: expected_losses(lr.expand(STEPS))[-1] / STEPS)
    assert errors_away(found, want) < 4


# The noise


def test_baselines_make_it_less_noisy():
    noise = {}
    for name in BASELINES:
        estimator = build(quadratics(True), num_tasks=10, num_rollouts=8, baseline=name)
        noise[name] = float(draws(estimator, 30, meta=GENTLE, skip=5).std())
    assert noise["moving"] < 0.8 * noise[None]
    assert noise["learned"] < 0.97 * noise["moving"]  # tasks differ in their losses
    assert noise["rollouts"] < 0.8 * noise[None]


def test_the_learned_baseline_explains_what_is_linear_in_its_features():
    estimator = build(quadratics(True), num_tasks=50, baseline="learned", std=0.01)
    assert estimates(estimator, 5, meta=GENTLE)[-1].metrics["baseline_explains"] > 0.8
    none = estimates(build(baseline=None), 1)[0]
    assert none.metrics["baseline_explains"] == 0


def test_returns_written_out():
    values = torch.tensor([1.0, 2.0, 4.0])
    assert returns_to_go(values, 0.5, 1).tolist() == [2 + 0.5 * 4, 4, 0]
    assert returns_to_go(values, 0.5, 0).tolist() == [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4]
    assert returns_to_go(values[:1], 1.0, 1).tolist() == [0]


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("lag", [0, 1])
def test_returns_are_the_discounted_sums_of_what_is_to_come(discount, lag):
    """Written as one matrix: row t has discount^(s - t - lag) from s = t + lag on, else zeros."""
    values = torch.randn(6, 3, 2, generator=fmeta.random.fold_in(1), **DOUBLE)
    ahead = torch.arange(6) - torch.arange(6)[:, None] - lag
    matrix = torch.where(ahead >= 0, torch.tensor(discount, **DOUBLE) ** ahead.clamp_min(0), 0.0)
    close(returns_to_go(values, discount, lag), torch.einsum("ts,s...->t...", matrix, values))


def test_the_learned_baseline_is_the_least_squares_fit_to_earlier_estimates():
    """Against NumPy's solver: rows of the estimate before the last count 0.9 times as much."""
    generator = fmeta.random.fold_in(2)
    losses, returns = torch.rand(2, 3, 5, 8, 2, generator=generator, **DOUBLE)
    baseline = BASELINES["learned"]()
    state = baseline.init(5)
    for i in range(2):
        state = baseline.estimate(state, losses[i], returns[i])[1]
    got = baseline.estimate(state, losses[2], returns[2])[0]

    left = (np.arange(5, 0, -1) / 5)[:, None, None] * np.ones((5, 8, 2))
    features = [
        np.stack([left**k * f for k in range(3) for f in (np.ones_like(x), x, np.arcsinh(x))], -1)
        for x in losses.numpy()
    ]
    root = np.sqrt([0.9, 1.0])[:, None, None, None]
    rows = (root[..., None] * np.stack(features[:2])).reshape(-1, 9)
    wanted = (root * returns[:2].numpy()).reshape(-1)
    # The ridge, a millionth of the features' mean square, as further rows whose answer is 0.
    ridge = np.sqrt(1e-6 * np.square(rows).sum(0).mean()) * np.eye(9)
    fit = np.linalg.lstsq(np.vstack([rows, ridge]), np.append(wanted, np.zeros(9)), rcond=None)[0]
    close(got, torch.from_numpy(features[2] @ fit), 1e-8)
    assert got.std() > 0.02


def test_the_slope_of_fitted_rollouts_is_the_least_squares_fit_to_earlier_estimates():
    """Against NumPy's solver, as above: of each step, of differences from the other rollouts."""
    generator = fmeta.random.fold_in(3)
    losses, returns = torch.rand(2, 3, 5, 8, 4, generator=generator, **DOUBLE)
    returns += torch.arange(5.0)[:, None, None] * losses
    baseline = BASELINES["fitted_rollouts"]()
    state = baseline.init(5)
    close(baseline.estimate(state, losses[0], returns[0])[0], others(returns[0]))
    for i in range(2):
        state = baseline.estimate(state, losses[i], returns[i])[1]
    got = baseline.estimate(state, losses[2], returns[2])[0]
    for t in range(5):
        root = np.sqrt([0.9, 1.0])[:, None, None]
        x, y = (root * (v[:2, t] - others(v[:2, t])).numpy() for v in (losses, returns))
        slope = np.linalg.lstsq(x.reshape(-1, 1), y.reshape(-1), rcond=None)[0][0]
        now = losses[2, t]
        close(got[t], others(returns[2, t]) + slope * (now - others(now)), 1e-4)
        assert abs(slope - t) < 0.5


def others(values):
    """Of each rollout the mean of the task's others."""
    return (values.sum(-1, keepdim=True) - values) / (values.shape[-1] - 1)


def test_fitted_rollouts_take_away_the_luck_of_earlier_steps():
    """Which is what rollouts differ by where there is noise and little that undoes it."""
    left = {}
    for name in ("rollouts", "fitted_rollouts"):
        estimator = build(num_tasks=10, num_rollouts=8, baseline=name, horizon=10, discount=0.5)
        found = estimates(estimator, 4, meta=GENTLE)[-1]
        left[name] = 1 - float(found.metrics["baseline_explains"])
    assert left["fitted_rollouts"] < 0.7 * left["rollouts"]


@pytest.mark.parametrize("name", [name for name in BASELINES if name])
def test_a_baseline_knows_nothing_of_the_training_that_it_is_for(name):
    """So its part in the gradient has mean zero."""
    baseline = BASELINES[name]()
    generator = fmeta.random.fold_in(0)
    losses, returns, changed = (torch.rand(3, 4, 2, generator=generator) for _ in range(3))
    state = baseline.estimate(baseline.init(3), losses, returns)[1]
    for known in (baseline.init(3), state):
        other = returns.clone()
        other[:, 1, 1] = changed[:, 1, 1]
        values, again = (baseline.estimate(known, losses, r)[0] for r in (returns, other))
        close(values[:, 1, 1], again[:, 1, 1], 1e-6)


def test_moving_means_are_those_of_earlier_estimates():
    baseline = BASELINES["moving"]()
    state = baseline.init(2)
    for level in (1.0, 3.0):
        values, state = baseline.estimate(state, torch.zeros(2, 3, 1), torch.full((2, 3, 1), level))
    close(values, torch.ones(2, 3, 1), 1e-6)
    values, _ = baseline.estimate(state, torch.zeros(2, 3, 1), torch.zeros(2, 3, 1))
    close(values, torch.full((2, 3, 1), (0.9 * 1 + 3) / 1.9), 1e-6)


# Advantages in units of their spread


@pytest.mark.parametrize("by", ["task", "step"])
@pytest.mark.parametrize(("baseline", "times"), [("moving", 1.0), ("rollouts", 12 / 11)])
def test_a_normalized_mean_is_that_of_steps_with_weights(by, baseline, times):
    """Each step's part of the true gradient, times the mean of 1 over the spread of 11 others.

    The mean of the others varies as well, by which all advantages are ``times`` as far apart.
    """
    options = {"num_tasks": 10, "num_rollouts": 12}
    parts = grad(lambda lr: expected_losses(lr).mean())(META["lr"].expand(STEPS))[:-1]
    weights = []
    for one in estimates(build(**options), 60, seed=1):  # other trainings than those below
        returns = times * returns_to_go(one.metrics["losses"], 1.0, 1)
        variance = returns[..., 1:].var(-1)
        variance = variance.mean(0, keepdim=True) if by == "task" else variance[:-1]
        weights.append(variance.expand(STEPS - 1, -1).rsqrt())
    want = (torch.stack(weights).mean((0, 2)) * parts).sum().reshape(1)
    found = draws(build(**options, baseline=baseline, normalize=by), 60)
    assert errors_away(found, want) < 4
    assert errors_away(found, 0.8 * want) > 4  # so the noise is small enough to tell


@pytest.mark.parametrize("by", ["task", "step"])
def test_spreads_are_those_of_the_other_rollouts(by):
    """Against NumPy."""
    advantages = torch.rand(3, 2, 5, generator=fmeta.random.fold_in(0), **DOUBLE)
    advantages *= torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    got = normalized(advantages, by)
    for task in range(2):
        for r in range(5):
            others = np.delete(advantages[:, task].numpy(), r, axis=1)
            variance = others.var(axis=1, ddof=1)
            spread = np.sqrt(variance.mean() if by == "task" else variance)
            close(got[:, task, r], advantages[:, task, r] / torch.tensor(spread + np.zeros(3)))
    assert normalized(advantages, None) is advantages


@pytest.mark.parametrize("by", ["task", "step"])
@pytest.mark.parametrize("name", BASELINES)
def test_a_spread_knows_nothing_of_the_training_that_it_is_for(by, name):
    """So a step is not divided by its own luck, by way of what others are compared to either."""
    baseline = BASELINES[name]()
    generator = fmeta.random.fold_in(0)
    losses, returns, changed = (torch.rand(3, 4, 5, generator=generator, **DOUBLE) for _ in "123")
    state = baseline.estimate(baseline.init(3), losses, returns)[1]
    for known in (baseline.init(3), state):
        spreads = []
        for own in (returns, changed):
            given = returns.clone()
            given[:, 1, 1] = own[:, 1, 1]
            advantages = given - baseline.estimate(known, losses, given)[0]
            spreads.append((advantages / normalized(advantages, by))[:, 1, 1])
        close(*spreads)


@pytest.mark.parametrize("by", ["task", "step"])
def test_large_losses_count_as_much_as_small_ones(by):
    options = {"num_rollouts": 4, "baseline": "rollouts", "normalize": by}
    want, got = (
        estimates(build(quadratics(True), meta_loss=score, **options), 2)
        for score in (None, lambda losses, evals, t, horizon: 1000 * losses)
    )
    for a, b in zip(got, want, strict=True):
        close(a.grads, b.grads)
        close(a.loss, 1000 * b.loss)


def test_where_nothing_differs_nothing_is_learned():
    """The last step has no losses after it, and rounding is no spread."""
    same = torch.ones(2, 1, 4, **DOUBLE)
    same[1] += 1e-14 * torch.arange(4.0)
    other = torch.tensor([[1.0, 2.0, 4.0, 8.0]], **DOUBLE)
    assert torch.equal(normalized(torch.stack([*same, other]), "step")[:2], 0 * same)


# Draws, state, and how it is worked out


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_laws_hold(baseline):
    estimator = build(quadratics(True), baseline=baseline, num_rollouts=2)
    assert set(check_estimator(estimator, META).held) == set(ESTIMATOR_LAWS) - {"unbiased"}


def test_the_law_of_the_mean_holds():
    estimator = build(baseline="rollouts", **MANY)
    report = check_estimator(
        estimator, META, laws=["unbiased"], true_gradient={"lr": true_gradient()[0]}
    )
    assert "unbiased" in report.held


def test_a_task_does_not_depend_on_how_many_there_are():
    few, many = (estimates(build(quadratics(True), num_tasks=n), 2) for n in (2, 5))
    for a, b in zip(few, many, strict=True):
        close(b.metrics["losses"][:, :2], a.metrics["losses"])
        assert torch.equal(b.metrics["drawn"][:2], a.metrics["drawn"])


def test_rollouts_share_the_task_and_not_the_noise():
    losses = estimates(build(quadratics(True), num_rollouts=3), 1)[0].metrics["losses"]
    assert losses.shape == (STEPS, 4, 3)
    close(losses[0, :, 0], losses[0, :, 1])
    assert (losses[1:, :, 0] - losses[1:, :, 1]).abs().min() > 1e-4


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 1}, {"chunk_size": 3}, {"trace": False}, {"checkpoint": "sqrt"}],
    ids=lambda o: "-".join(map(str, *o.items())),
)
def test_how_it_is_worked_out_changes_nothing(options):
    given = {"rule": HEAVY, "num_rollouts": 3, "recurrent": True, "normalize": "step"}
    want, got = (
        estimates(build(quadratics(True), **given, **more), 2, meta=HEAVY_META)
        for more in ({}, options)
    )
    for a, b in zip(got, want, strict=True):
        close(a.grads, b.grads)


@pytest.mark.parametrize("name", ["adam", "linear"])
def test_hidden_states_that_do_not_depend_on_what_is_learned(name):
    """Then it makes no difference whether they are differentiated."""
    if name == "adam":
        rule = fmeta.learn(optimizers.adam, {"lr": "log"}, lr=0.05)
    else:
        rule = optimizers.linear(0.05)
    meta = trees.cast(rule.init(), torch.float64)
    one, other = (
        estimates(build(quadratics(True), rule=rule, recurrent=r), 2, meta=meta)[-1]
        for r in (True, False)
    )
    close(one.grads, other.grads)
    assert vector(one.grads).abs().min() > 0


def test_a_network_learns_by_it():
    """Twenty steps of an outer optimizer on a rule with a bad rate."""
    rule = fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=0.001)
    estimator = score_function(
        rule, digits((4,), batch_size=16), num_tasks=6, horizon=8, std=0.02, recurrent=False
    )
    found = fmeta.meta_train.run(
        estimator, rule.init(), outer=optimizers.adam(0.3), num_steps=20, seed=0
    )
    assert float(found.meta_params["lr"].exp()) > 0.01


def test_rules_that_need_more_than_gradients():
    rule = optimizers.hebbian_mlp()
    estimator = score_function(
        rule, digits((4,), batch_size=8), num_tasks=2, horizon=3, std=0.01, num_rollouts=2
    )
    found = estimates(estimator, 1, meta=rule.init())[0]
    assert not found.metrics["diverged"].any()
    assert vector(found.grads).any()


def test_leaves_that_a_rule_leaves_alone_have_no_noise():
    rule = fmeta.masked(optimizers.linear(0.05), lambda path, p: path == "w0")
    estimator = score_function(
        rule, digits((4,), batch_size=8), num_tasks=2, horizon=3, std=0.5, relative=True
    )
    assert vector(estimates(estimator, 1, meta=rule.init())[0].grads).any()


# Trainings that diverge


@pytest.mark.parametrize("baseline", BASELINES)
def test_tasks_that_diverge_are_left_out(baseline):
    ids = [quadratics(True).sample(fmeta.random.fold_in(0, 0, i, 0))["id"] for i in range(4)]
    bad = sorted(ids)[2]
    broken = quadratics(True, is_bad=lambda id: id == bad)
    options = {"num_rollouts": 3, "baseline": baseline, "normalize": "step"}
    found = estimates(build(broken, **options), 3)
    assert found[0].metrics["diverged"].tolist() == [i == bad for i in ids]
    assert found[0].metrics["diverged_at"].tolist() == [0 if i == bad else -1 for i in ids]
    for one in found:
        assert vector(one.grads).isfinite().all()
        assert one.loss.isfinite()
    assert found[1].metrics["baseline_explains"].isfinite()


@pytest.mark.parametrize("baseline", ["moving", "learned", "fitted_rollouts"])
def test_when_all_diverge_the_baseline_keeps_what_it_knows(baseline):
    options = {"baseline": baseline, "num_rollouts": 2}
    estimator = build(**options)
    broken = build(quadratics(is_bad=lambda id: id >= 0), **options)
    _, state = estimator.estimate(META, estimator.init(META, 0))
    found, after = broken.estimate(META, state)
    assert found.loss.isnan()
    assert vector(found.grads).isnan().all()
    close(after.baseline, state.baseline, 0)


def test_a_mixture_has_a_part_of_each():
    both = build(mixture([quadratics(), quadratics(True)]), num_tasks=6, num_rollouts=2)
    found = estimates(both, 2)[-1]
    assert found.metrics["family"].tolist() == [0] * 3 + [1] * 3
    assert found.metrics["losses"].shape == (STEPS, 6, 2)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be at least 1, got 0"),
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"num_rollouts": 0}, "num_rollouts must be at least 1, got 0"),
        ({"std": 0.0}, "std must be positive and finite, got 0.0"),
        ({"std": {"w": torch.tensor([0.1, -1.0])}}, "std must be positive and finite, got -1.0"),
        ({"discount": 1.5}, "discount must be between 0 and 1, got 1.5"),
        ({"baseline": "value"}, "unknown baseline 'value': there are None, 'moving', 'learned'"),
        ({"baseline": "rollouts"}, "give num_rollouts >= 2"),
        ({"baseline": "fitted_rollouts"}, "give num_rollouts >= 2"),
        ({"normalize": "all"}, "unknown normalize 'all': there are None, 'task', 'step'"),
        ({"normalize": "task", "num_rollouts": 2}, "give num_rollouts >= 3"),
        ({"rule": RULE._replace(needs=frozenset({"noise"}))}, "needs noise, but"),
    ],
)
def test_wrong_numbers_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_start_that_is_learned_is_refused():
    estimator = build(rule=optimizers.sgd(0.1), bind=lambda meta, config: ({}, {"w": meta["w"]}))
    with pytest.raises(ValueError, match="take `full` or `pes` for that"):
        estimator.init({"w": START}, 0)
    fixed = build(bind=lambda meta, config: (meta, {"w": 2 * START}))
    assert estimates(fixed, 1)[0].loss > 2 * estimates(build(), 1)[0].loss


def test_a_deviation_of_another_structure_is_refused():
    with pytest.raises(ValueError, match="std"):
        estimates(build(std={"v": 0.1}), 1)


def test_inference_mode_and_recording_outside_change_nothing():
    want = estimates(build(), 2)[-1]
    leaf = trees.map(lambda x: x.clone().requires_grad_(), META)
    got = estimates(build(), 2, meta=leaf)[-1]
    assert not any(x.requires_grad for x in trees.leaves((got.loss, got.grads)))
    close(got.grads, want.grads)
    with torch.inference_mode():
        close(estimates(build(), 2)[-1].grads, want.grads)
