"""Wrappers that skip, accumulate, average and look ahead: beside torch and loops by hand."""

import copy

import pytest
import torch
from torch.func import grad, vmap

import fmeta
from fmeta import optimizers, trees
from fmeta._leafwise import is_leafwise
from fmeta.optimizer import Hidden, Optimizer
from fmeta.random import fold_in

DOUBLE = {"dtype": torch.float64}
PARAMS = {
    "w": torch.randn(4, 3, generator=fold_in(0), **DOUBLE),
    "b": torch.randn(3, generator=fold_in(1), **DOUBLE),
    "kernel": torch.randn(2, 3, 2, 2, generator=fold_in(2), **DOUBLE),
}
STEPS = 7


def gradients(t, absent=()):
    return {
        k: None if k in absent else torch.randn(p.shape, generator=fold_in(3, t, i), **DOUBLE)
        for i, (k, p) in enumerate(PARAMS.items())
    }


def run(rule, grads, params=PARAMS, **start):
    """Parameters and hidden state after each of these gradients, the start first."""
    th = rule.init()
    trail = [(params, rule.init_hidden(th, params, **start))]
    for g in grads:
        trail.append(rule.step(th, *trail[-1][:1], g, trail[-1][1]))
    return trail


def close(got, want, tol=1e-12):
    trees.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tol, atol=tol), got, want)


class InTorch:
    """A torch optimizer on copies of the parameters, which takes given gradients."""

    def __init__(self, build, params=PARAMS):
        self.module = torch.nn.ParameterDict({k: p.clone() for k, p in params.items()})
        self.optimizer = build(self.module.parameters())

    def step(self, grads):
        for k, p in self.module.items():
            p.grad = grads[k].clone()
        self.optimizer.step()
        return self.params()

    def params(self):
        return {k: p.detach().clone() for k, p in self.module.items()}


INNER = {
    "adam": (lambda: optimizers.adam(0.1), lambda ps: torch.optim.Adam(ps, 0.1)),
    "momentum": (
        lambda: optimizers.sgd(0.1, momentum=0.9),
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
    ),
}
inner = pytest.mark.parametrize("name", INNER)

# --- apply_if_finite ------------------------------------------------------------------------------


def spoiled(t, bad=float("nan")):
    g = gradients(t)
    return {**g, "b": g["b"] * torch.tensor([1.0, bad, 1.0], **DOUBLE)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@inner
def test_bad_gradients_are_as_if_they_had_not_been(name, bad):
    rule = fmeta.apply_if_finite(INNER[name][0]())
    at = {1, 2, 5}
    trail = run(rule, [spoiled(t, bad) if t in at else gradients(t) for t in range(STEPS)])
    torchs = InTorch(INNER[name][1])
    want = [torchs.params()]
    for t in range(STEPS):
        want.append(want[-1] if t in at else torchs.step(gradients(t)))
    close([p for p, _ in trail], want, 1e-10)
    counts = [tuple(int(h.shared[k]) for k in ("skipped", "consecutive")) for _, h in trail]
    assert counts == [(0, 0), (0, 0), (1, 1), (2, 2), (2, 0), (2, 0), (3, 1), (3, 0)]
    close(trail[3][1].leaves, trail[1][1].leaves, 0)


def test_shared_state_stays_too():
    rule = fmeta.apply_if_finite(fmeta.scheduled(optimizers.sgd(0.1), lambda t, n: 1 / (t + 1)))
    got = run(rule, [gradients(0), spoiled(1), gradients(1)])[-1]
    want = run(
        fmeta.scheduled(optimizers.sgd(0.1), lambda t, n: 1 / (t + 1)), map(gradients, [0, 1])
    )
    close(got[0], want[-1][0])
    assert got[1].shared["inner"]["t"] == 2


@pytest.mark.parametrize("limit", [0, 1, 3, torch.tensor(1)], ids=["0", "1", "3", "tensor 1"])
def test_after_too_many_in_a_row_they_are_let_through(limit):
    rule = fmeta.apply_if_finite(optimizers.sgd(0.1), limit)
    trail = run(rule, [gradients(0), *(spoiled(t) for t in range(5))])
    for k, (params, hidden) in enumerate(trail[2:], start=1):
        assert hidden.shared["skipped"] == min(k, int(limit))
        assert hidden.shared["consecutive"] == k
        assert params["b"].isfinite().all() == (k <= int(limit))


def test_a_bad_loss_is_refused_where_it_is_read():
    by_loss = Optimizer(
        lambda generator=None: {},
        lambda th, p, *, num_steps=None: Hidden(
            trees.map(lambda x: {}, p), {"last": torch.zeros(())}
        ),
        lambda th, p, g, h, *, loss=None, extras=None: (
            trees.map(lambda x: -x * loss, g),
            Hidden(h.leaves, {"last": loss}),
        ),
        needs=frozenset({"loss"}),
    )
    rule = fmeta.apply_if_finite(by_loss)
    p, g = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    h = rule.init_hidden({}, p)
    same, h = rule.step({}, p, g, h, loss=torch.tensor(torch.inf))
    assert torch.equal(same["w"], p["w"])
    assert h.shared["skipped"] == 1
    assert h.shared["inner"]["last"] == 0
    assert (rule.step({}, p, g, h, loss=torch.tensor(1.0))[0]["w"] == 0).all()
    # One that no rule reads is not looked at.
    rule = fmeta.apply_if_finite(optimizers.sgd(1.0))
    moved, _ = rule.step({}, p, g, rule.init_hidden({}, p), loss=torch.tensor(torch.nan))
    assert (moved["w"] == 0).all()


@pytest.mark.parametrize("build", ["adam", "normalized_mlp", "clip and lstm"])
def test_meta_gradients_stay_finite_and_are_those_of_the_steps_taken(build):
    rules = {
        "adam": fmeta.learn(optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=0.1),
        "normalized_mlp": optimizers.normalized_mlp(),
        "clip and lstm": fmeta.chain(fmeta.clip_by_global_norm(1.0), optimizers.lstm()),
    }
    rule = rules[build]
    th = trees.cast(rule.init(fold_in(5)), torch.float64)
    start = {"w": torch.tensor([[0.3, -0.2], [1.0, 0.5]], **DOUBLE)}
    loss = lambda p, b: ((p["w"] - 1).square() * (1 + p["w"].square())).sum() + (b * p["w"]).sum()
    good = torch.zeros(5)
    bad = torch.tensor([0.0, torch.nan, 0.0, torch.inf, 0.0, 0.0, 0.0])

    def end(rule, batches):
        params = lambda th, p: fmeta.unroll(rule, loss, th, p, batches, num_steps=5).params
        return lambda th, p: params(th, p)["w"].square().sum()

    with_bad, without = end(fmeta.apply_if_finite(rule), bad), end(rule, good)
    torch.testing.assert_close(with_bad(th, start), without(th, start))
    got, want = (grad(f, argnums=(0, 1))(th, start) for f in (with_bad, without))
    close(got, want, 1e-9)
    assert any(x.abs().max() > 1e-8 for x in trees.leaves(want))


def test_each_task_of_a_batch_is_judged_by_itself():
    rule = fmeta.apply_if_finite(optimizers.sgd(1.0))
    step = lambda p, g: rule.step({}, p, g, rule.init_hidden({}, p))
    p, h = vmap(step)(torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.nan, 1.0]]))
    assert torch.equal(p, torch.tensor([[-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]]))
    assert h.shared["skipped"].tolist() == [0, 1]


def test_what_overflows_in_the_compute_dtype_is_not_finite():
    rule = fmeta.apply_if_finite(optimizers.sgd(1.0))
    p = torch.zeros(1, dtype=torch.bfloat16)
    h = rule.init_hidden({}, p)
    assert rule.step({}, p, torch.full((1,), 1e200, **DOUBLE), h)[1].shared["skipped"] == 1


# --- accumulate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, torch.tensor(3)], ids=["1", "2", "3", "tensor 3"])
@inner
def test_accumulated_gradients_are_torchs_by_hand(name, every):
    rule = fmeta.accumulate(INNER[name][0](), every)
    k = int(every)
    got = run(rule, map(gradients, range(STEPS)))
    torchs = InTorch(INNER[name][1])
    want = [torchs.params()]
    for t in range(STEPS):
        if (t + 1) % k:
            want.append(want[-1])
            continue
        rows = [gradients(s) for s in range(t + 1 - k, t + 1)]
        want.append(torchs.step({key: sum(g[key] for g in rows) / k for key in PARAMS}))
    close([p for p, _ in got], want, 1e-10)
    assert [int(h.shared["t"]) for _, h in got] == [t % k for t in range(STEPS + 1)]


def test_small_batches_are_one_large_one():
    x = torch.randn(12, 5, generator=fold_in(7), **DOUBLE)
    y = torch.randn(12, generator=fold_in(8), **DOUBLE)
    loss = lambda p, b: (b[0] @ p - b[1]).square().mean()
    p = torch.zeros(5, **DOUBLE)
    cut = lambda n: (x.reshape(-1, n, 5), y.reshape(-1, n))
    many = fmeta.unroll(fmeta.accumulate(optimizers.adam(0.1), 3), loss, {}, p, cut(2))
    few = fmeta.unroll(optimizers.adam(0.1), loss, {}, p, cut(6))
    torch.testing.assert_close(many.params, few.params, rtol=1e-12, atol=1e-12)


def test_a_leaf_without_gradients_stays_and_what_it_has_waits():
    rule = fmeta.accumulate(optimizers.sgd(1.0, momentum=0.5), 2)
    absent = [(), ("b",), ("w",), ("b",), (), ()]
    trail = run(rule, [gradients(t, a) for t, a in enumerate(absent)])
    g = [gradients(t) for t in range(6)]
    # b: the gradient of step 0 waited through the updates at 1 and 3, to that at 5
    for params, _ in trail[:6]:
        assert torch.equal(params["b"], PARAMS["b"])
    mean = (g[0]["b"] + g[2]["b"] + g[4]["b"] + g[5]["b"]) / 4
    close(trail[6][0]["b"], PARAMS["b"] - mean)
    assert trail[5][1].leaves["b"]["count"] == 3
    # w: two gradients, then one, then two
    rows = [(g[0]["w"] + g[1]["w"]) / 2, g[3]["w"], (g[4]["w"] + g[5]["w"]) / 2]
    want = run(optimizers.sgd(1.0, momentum=0.5), [{"w": r} for r in rows], {"w": PARAMS["w"]})
    close([trail[i][0]["w"] for i in (2, 4, 6)], [p["w"] for p, _ in want[1:]])


@pytest.mark.parametrize("horizon", [12, torch.tensor(12)], ids=["int", "tensor"])
@pytest.mark.parametrize("every", [3, torch.tensor(3)], ids=["int", "tensor"])
def test_the_horizon_inside_counts_updates(horizon, every):
    schedule = fmeta.schedules.linear()
    rule = fmeta.accumulate(fmeta.scheduled(optimizers.sgd(1.0), schedule), every)
    assert rule.needs == {"num_steps"}
    got = run(rule, [{"x": torch.ones(())}] * 12, {"x": torch.zeros(())}, num_steps=horizon)
    assert float(got[-1][0]["x"]) == pytest.approx(-(1 + 0.75 + 0.5 + 0.25))
    short = rule.init_hidden({}, PARAMS, num_steps=2)
    assert short.shared["inner"]["num_steps"] == 1


def test_a_rule_that_reads_the_loss_reads_the_mean():
    seen = []

    def update(th, p, g, h, *, loss=None, extras=None):
        seen.append(float(loss))
        return trees.map(torch.zeros_like, g), h

    rule = fmeta.accumulate(
        Optimizer(
            lambda generator=None: {},
            lambda th, p, *, num_steps=None: Hidden(trees.map(lambda x: {}, p), {}),
            update,
            frozenset({"loss"}),
        ),
        2,
    )
    p = {"w": torch.ones(2)}
    h = rule.init_hidden({}, p)
    for loss in (1.0, 3.0, 5.0, 6.0):
        p, h = rule.step({}, p, p, h, loss=torch.tensor(loss))
    assert seen[1::2] == [2.0, 5.5]


def test_tasks_may_accumulate_at_different_paces():
    def end(every):
        rule = fmeta.accumulate(optimizers.sgd(1.0), every)
        return fmeta.unroll(rule, lambda p, b: b * p, {}, torch.zeros(()), torch.ones(6)).params

    assert vmap(end)(torch.tensor([1, 2, 4])).tolist() == [-6.0, -3.0, -1.0]


# --- averaged -------------------------------------------------------------------------------------


def shown(rule, trail):
    return [rule.eval_params(rule.init(), *row) for row in trail]


AVERAGES = {
    "uniform": ("uniform", True, torch.optim.swa_utils.get_swa_avg_fn()),
    "exponential": (0.7, False, torch.optim.swa_utils.get_ema_avg_fn(0.7)),
}


@pytest.mark.parametrize("kind", AVERAGES)
@inner
def test_averages_are_torchs(name, kind):
    decay, debias, avg_fn = AVERAGES[kind]
    rule = fmeta.averaged(INNER[name][0](), decay, debias=debias)
    trail = run(rule, map(gradients, range(STEPS)))
    torchs = InTorch(INNER[name][1])
    swa = torch.optim.swa_utils.AveragedModel(torchs.module, avg_fn=avg_fn)
    want = [torchs.params()]
    for t in range(STEPS):
        plain = torchs.step(gradients(t))
        close(trail[t + 1][0], plain, 1e-10)
        swa.update_parameters(torchs.module)
        want.append({k: p.detach().clone() for k, p in swa.module.items()})
    close(shown(rule, trail), want, 1e-10)


@pytest.mark.parametrize("start", [0, 3, torch.tensor(3), 20], ids=["0", "3", "tensor 3", "20"])
@pytest.mark.parametrize("decay", [0.0, 0.9, torch.tensor(0.9, **DOUBLE), "uniform"], ids=str)
def test_averages_are_weighted_means_of_what_came_after_the_start(decay, start):
    rule = fmeta.averaged(optimizers.adam(0.1), decay, start=start)
    trail = run(rule, map(gradients, range(STEPS)))
    for t, got in enumerate(shown(rule, trail)):
        rows = [p for p, _ in trail[int(start) + 1 : t + 1]] or [trail[t][0]]
        weights = [
            1.0 if decay == "uniform" else float(decay) ** (len(rows) - 1 - i)
            for i in range(len(rows))
        ]
        mean = {
            k: sum(w * p[k] for w, p in zip(weights, rows, strict=True)) / sum(weights)
            for k in PARAMS
        }
        close(got, mean)


def test_a_long_slow_average_is_right_in_float32():
    rule = fmeta.averaged(optimizers.sgd(1.0), 0.9999)
    p, g = torch.zeros(()), -torch.ones(())
    h = rule.init_hidden({}, p)
    for _ in range(50):
        p, h = rule.step({}, p, g, h)
    weights = [0.9999**i for i in range(50)]
    want = sum(w * (50 - i) for i, w in enumerate(weights)) / sum(weights)
    assert float(rule.eval_params({}, p, h)) == pytest.approx(want, rel=1e-5)


def test_what_moves_the_parameters_besides_is_averaged_too():
    rule = fmeta.averaged(optimizers.sgd(1.0), "uniform")
    p = torch.zeros(())
    h = rule.init_hidden({}, p)
    seen = []
    for _ in range(4):
        delta, h = rule.update({}, p, torch.ones(()), h)
        p = (p + 0.1 * delta).clamp(min=-0.25)  # the rate of a group, a projection
        seen.append(float(p))
        assert float(rule.eval_params({}, p, h)) == pytest.approx(sum(seen) / len(seen))


def test_the_average_of_averages_and_of_other_evaluation_parameters():
    half = optimizers.sgd(0.1)._replace(
        eval_params=lambda th, p, h: trees.map(lambda x: None if x is None else x / 2, p)
    )
    rule, plain = fmeta.averaged(half, 0.8), fmeta.averaged(optimizers.sgd(0.1), 0.8)
    want = shown(plain, run(plain, map(gradients, range(STEPS))))
    got = shown(rule, run(rule, map(gradients, range(STEPS))))
    close(got, trees.map(lambda x: x / 2, want))
    twice = fmeta.averaged(fmeta.averaged(optimizers.sgd(0.1), "uniform"), 0.8)
    once = fmeta.averaged(optimizers.sgd(0.1), "uniform")
    means = shown(once, run(once, map(gradients, range(STEPS))))[1:]
    weights = [0.8 ** (STEPS - 1 - i) for i in range(STEPS)]
    want = {
        k: sum(w * m[k] for w, m in zip(weights, means, strict=True)) / sum(weights) for k in PARAMS
    }
    close(shown(twice, run(twice, map(gradients, range(STEPS))))[-1], want)


def test_a_leaf_without_gradients_is_averaged_over_its_own_updates():
    rule = fmeta.averaged(optimizers.sgd(0.1), "uniform")
    trail = run(rule, [gradients(t, ("b",) if t in (1, 2) else ()) for t in range(5)])
    for key, steps in (("b", (1, 4, 5)), ("w", (1, 2, 3, 4, 5))):
        want = sum(trail[s][0][key] for s in steps) / len(steps)
        close(shown(rule, trail)[-1][key], want)
    assert torch.equal(trail[1][1].leaves["b"]["average"], trail[3][1].leaves["b"]["average"])


def test_an_average_of_low_precision_parameters_is_kept_in_float32():
    rule = fmeta.averaged(optimizers.sgd(1.0), "uniform")
    p = torch.ones(1, dtype=torch.bfloat16)
    h = rule.init_hidden({}, p)
    seen = []
    for _ in range(3):
        p, h = rule.step({}, p, torch.full_like(p, 2.0**-8), h)
        seen.append(float(p))
    assert h.leaves["average"].dtype is torch.float32
    assert float(h.leaves["average"]) == pytest.approx(sum(seen[:2]) / 2)
    assert rule.eval_params({}, p, h).dtype is torch.bfloat16


def test_the_decay_is_learned_by_the_loss_of_the_average():
    rule = fmeta.learn(
        lambda decay: fmeta.averaged(optimizers.sgd(0.3), decay),
        {"decay": "logit"},
        decay=torch.tensor(0.6, **DOUBLE),
    )
    noise = torch.randn(6, 3, generator=fold_in(9), **DOUBLE)

    def meta(th):
        run = fmeta.unroll(rule, lambda p, b: (p - b).square().sum(), th, noise[0], noise)
        return rule.eval_params(th, run.params, run.hidden).square().sum()

    th = rule.init()
    moved = lambda e: meta({"decay": th["decay"] + e})
    numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(grad(meta)(th)["decay"], numeric, rtol=1e-7, atol=1e-9)
    assert numeric.abs() > 1e-3


def test_the_average_of_a_torch_optimizer_with_a_changing_rate():
    model = torch.nn.Linear(3, 2)
    opt = fmeta.torch_optim.LearnedOptimizer(
        model.parameters(), fmeta.averaged(optimizers.adam(0.1), "uniform"), lr=0.5
    )
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.3)
    seen = []
    for t in range(6):
        opt.zero_grad()
        (model(torch.full((4, 3), 1.0 + t)) - 1).square().mean().backward()
        opt.step()
        scheduler.step()
        seen.append(model.weight.detach().clone())
    with opt.eval_params():
        shown = model.weight.detach().clone()
    torch.testing.assert_close(shown, sum(seen) / len(seen), rtol=1e-5, atol=1e-6)


# --- lookahead ------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, torch.tensor(3)], ids=["1", "3", "tensor 3"])
@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.8, **DOUBLE)], ids=["0.5", "tensor 0.8"])
@inner
def test_lookahead_is_algorithm_1_around_torchs_optimizer(name, every, rate):
    rule = fmeta.lookahead(INNER[name][0](), every, rate)
    trail = run(rule, map(gradients, range(STEPS)))
    torchs = InTorch(INNER[name][1])
    slow = torchs.params()
    for t in range(STEPS):
        fast = torchs.step(gradients(t))
        if (t + 1) % int(every) == 0:
            slow = {k: slow[k] + rate * (fast[k] - slow[k]) for k in slow}
            with torch.no_grad():
                for k, p in torchs.module.items():
                    p.copy_(slow[k])
        close(trail[t + 1][0], torchs.params(), 1e-10)
        close(rule.eval_params({}, *trail[t + 1]), slow, 1e-10)


def test_lookahead_with_rate_one_is_the_optimizer():
    got = run(fmeta.lookahead(optimizers.adam(0.1), 2, 1.0), map(gradients, range(STEPS)))
    close(
        [p for p, _ in got], [p for p, _ in run(optimizers.adam(0.1), map(gradients, range(STEPS)))]
    )


def test_a_leaf_looks_ahead_over_its_own_updates():
    rule = fmeta.lookahead(optimizers.sgd(0.1), 2)
    trail = run(rule, [gradients(t, ("b",) if t == 1 else ()) for t in range(3)])
    g = [gradients(t) for t in range(3)]
    close(trail[3][0]["b"], PARAMS["b"] - 0.05 * (g[0]["b"] + g[2]["b"]))
    close(trail[2][0]["w"], PARAMS["w"] - 0.05 * (g[0]["w"] + g[1]["w"]))
    assert trail[2][0]["b"] is trail[1][0]["b"]


def test_slow_weights_go_through_the_inner_ones_evaluation():
    half = optimizers.sgd(0.1)._replace(
        eval_params=lambda th, p, h: trees.map(lambda x: None if x is None else x / 2, p)
    )
    rule = fmeta.lookahead(half, 2)
    trail = run(rule, map(gradients, range(3)))
    close(rule.eval_params({}, *trail[3]), trees.map(lambda x: x / 2, trail[2][0]))


def test_the_slow_rate_is_learned():
    rule = fmeta.learn(
        lambda slow_rate: fmeta.lookahead(optimizers.sgd(0.3), 2, slow_rate),
        {"slow_rate": "logit"},
        slow_rate=torch.tensor(0.6, **DOUBLE),
    )
    meta = lambda th: (
        fmeta.unroll(
            rule, lambda p, b: p.square().sum(), th, torch.ones(2, **DOUBLE), torch.zeros(4)
        )
        .params.square()
        .sum()
    )
    th = rule.init()
    moved = lambda e: meta({"slow_rate": th["slow_rate"] + e})
    numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(grad(meta)(th)["slow_rate"], numeric, rtol=1e-7, atol=1e-9)


# --- clip_by_value, orthogonalize -----------------------------------------------------------------


def transformed(transform, grads, params=PARAMS):
    return transform.update({}, params, grads, transform.init_hidden({}, params))[0]


def test_clipping_by_value_equals_torchs():
    got = transformed(fmeta.clip_by_value(0.5), gradients(0))
    leaves = [torch.zeros_like(p).requires_grad_() for p in PARAMS.values()]
    for leaf, g in zip(leaves, gradients(0).values(), strict=True):
        leaf.grad = g.clone()
    torch.nn.utils.clip_grad_value_(leaves, 0.5)
    for a, leaf in zip(got.values(), leaves, strict=True):
        assert torch.equal(a, leaf.grad)


def test_bounds_may_be_tensors_and_trees_and_are_learned():
    bounds = {"w": 0.1, "b": torch.tensor([0.1, 0.2, 0.3], **DOUBLE), "kernel": 10.0}
    got = transformed(fmeta.clip_by_value(bounds), gradients(0))
    want = {k: torch.minimum(torch.maximum(g, -b), b) for k, g, b in zip(
        PARAMS, gradients(0).values(), (torch.as_tensor(b, **DOUBLE) for b in bounds.values()),
        strict=True,
    )}  # fmt: skip
    close(got, want)
    outer = lambda b: sum(
        x.sum() for x in transformed(fmeta.clip_by_value(b), gradients(0)).values()
    )
    flat = torch.cat([g.flatten() for g in gradients(0).values()])
    slope = grad(outer)(torch.tensor(0.4, **DOUBLE))
    assert slope == (flat > 0.4).sum() - (flat < -0.4).sum()


def test_infinities_are_clipped_and_nothing_hides_a_nan():
    g = {"w": torch.tensor([torch.inf, -torch.inf, torch.nan, 0.2])}
    got = transformed(fmeta.clip_by_value(1.0), g, {"w": torch.zeros(4)})["w"]
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, torch.nan, 0.2]), equal_nan=True)


@pytest.mark.parametrize("steps", [1, 5])
def test_orthogonalized_matrices_keep_singular_vectors(steps):
    got = transformed(fmeta.orthogonalize(steps), gradients(0))
    for key, shape in (("w", (4, 3)), ("kernel", (2, 12))):
        left, values, right = torch.linalg.svd(
            gradients(0)[key].reshape(shape), full_matrices=False
        )
        x = values / values.norm()
        for _ in range(steps):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        want = (left * x) @ right
        torch.testing.assert_close(got[key].reshape(shape), want, rtol=1e-6, atol=1e-7)
    assert torch.equal(got["b"], gradients(0)["b"])


def test_orthogonalize_before_sgd_is_muon_without_momentum():
    wide = {k: PARAMS[k].reshape(s) for k, s in (("w", (3, 4)), ("kernel", (2, 3, 2, 2)))}
    grads = [{k: gradients(t)[k].reshape(p.shape) for k, p in wide.items()} for t in range(3)]
    got = run(fmeta.chain(fmeta.orthogonalize(), optimizers.sgd(0.1)), grads, wide)
    want = run(optimizers.muon(0.1, momentum=0.0, nesterov=False), grads, wide)
    close([p for p, _ in got], [p for p, _ in want])


# --- together, and what cannot be meant -----------------------------------------------------------

WRAPPERS = {
    "apply_if_finite": fmeta.apply_if_finite,
    "accumulate": lambda o: fmeta.accumulate(o, 1),
    "averaged": fmeta.averaged,
    "lookahead": lambda o: fmeta.lookahead(o, 2, 1.0),
}
wrappers = pytest.mark.parametrize("name", WRAPPERS)


@wrappers
def test_a_wrapper_goes_into_a_partition_and_a_mask(name):
    wrap = WRAPPERS[name]
    by_rank = lambda path, x: "vector" if x.ndim == 1 else "rest"
    rule = fmeta.partition(
        {"vector": wrap(optimizers.adam(0.1)), "rest": wrap(optimizers.sgd(0.2, momentum=0.5))},
        by_rank,
    )
    plain = fmeta.partition(
        {"vector": optimizers.adam(0.1), "rest": optimizers.sgd(0.2, momentum=0.5)}, by_rank
    )
    grads = [gradients(t) for t in range(4)]
    got = run(rule, grads)
    close(got[-1][0], run(plain, grads)[-1][0])
    trees.map(torch.isfinite, rule.eval_params(rule.init(), *got[-1]))
    masked = run(fmeta.masked(wrap(optimizers.adam(0.1)), lambda path, x: x.ndim == 1), grads)
    close(masked[-1][0]["b"], got[-1][0]["b"])
    assert masked[-1][0]["w"] is PARAMS["w"]
    assert masked[-1][1].leaves["w"] == {}
    inside = run(wrap(fmeta.masked(optimizers.adam(0.1), lambda path, x: x.ndim == 1)), grads)
    close(inside[-1][0], masked[-1][0])


@wrappers
def test_a_wrapper_takes_the_inner_ones_learned_parameters(name):
    rule = fmeta.learn(optimizers.adam, {"lr": "log"}, lr=0.1)
    wrapper = WRAPPERS[name](rule)
    assert wrapper.init() == rule.init()
    needy = rule._replace(needs=frozenset({"loss", "activations"}))
    assert WRAPPERS[name](needy).needs == {"loss", "activations"}


@pytest.mark.parametrize("name", ["averaged", "lookahead"])
def test_leaves_may_go_a_few_at_a_time_where_the_inner_one_lets_them(name):
    rule = WRAPPERS[name](optimizers.adam(0.1))
    assert is_leafwise(rule)
    assert not is_leafwise(WRAPPERS[name](fmeta.chain(fmeta.clip_by_global_norm(1.0))))
    params, hidden = run(rule, map(gradients, range(3)))[-1]
    whole, state = rule.update({}, params, gradients(3), hidden)
    for key in PARAMS:
        absent = [k for k in PARAMS if k != key]
        delta, alone = rule.update({}, params, gradients(3, absent), hidden)
        close((delta[key], alone.leaves[key]), (whole[key], state.leaves[key]), 0)


@wrappers
def test_an_interrupted_wrapper_goes_on_where_it_was(name):
    rule = WRAPPERS[name](optimizers.adam(0.1))
    whole = run(rule, map(gradients, range(6)))[-1]
    p, h = run(rule, map(gradients, range(3)))[-1]
    p, h = copy.deepcopy((p, h))
    for t in range(3, 6):
        p, h = rule.step({}, p, gradients(t), h)
    close(p, whole[0], 0)


@wrappers
def test_a_state_of_another_optimizer_is_refused(name):
    rule = WRAPPERS[name](optimizers.adam(0.1))
    other = optimizers.sgd(0.1).init_hidden({}, PARAMS)
    plain = optimizers.adam(0.1).init_hidden({}, PARAMS)
    for hidden in (plain, other):
        with pytest.raises(ValueError, match="of another optimizer"):
            rule.step({}, PARAMS, gradients(0), hidden)


WRONG = {
    "a builder": (lambda: fmeta.averaged(optimizers.adam), TypeError, "call the builder"),
    "errors": (lambda: fmeta.apply_if_finite(optimizers.sgd(), -1), ValueError, "at least 0"),
    "every": (lambda: fmeta.accumulate(optimizers.sgd(), 0), ValueError, "every must be an int"),
    "a float": (lambda: fmeta.lookahead(optimizers.sgd(), 2.0), ValueError, "every must be an int"),
    "a rate": (lambda: fmeta.lookahead(optimizers.sgd(), 2, -1.0), ValueError, "slow_rate must"),
    "a decay": (lambda: fmeta.averaged(optimizers.sgd(), 1.0), ValueError, "decay must be"),
    "a word": (lambda: fmeta.averaged(optimizers.sgd(), "mean"), ValueError, '"uniform", got'),
    "a start": (lambda: fmeta.averaged(optimizers.sgd(), start=-1), ValueError, "start must be"),
    "a bound": (lambda: fmeta.clip_by_value(0.0), ValueError, "bound must be positive"),
    "steps": (lambda: fmeta.orthogonalize(0), ValueError, "steps must be an integer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_refused(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
