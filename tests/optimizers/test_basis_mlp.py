"""`basis_mlp` against the same program in NumPy, and what its docstring claims."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import grad, vmap

import fmeta
from fmeta import Hidden, trees
from fmeta.optimizers import adam, basis_mlp
from fmeta.random import fold_in
from fmeta.testing import permutation_equivariant

TREE = {"w": (3, 5), "tall": (6, 2), "conv": (2, 3, 2, 2), "b": (4,), "s": ()}
ODD = {**TREE, "none": (0, 3), "empty": (0,)}
NETWORKS = ("w0", "w1", "tensor_w0", "tensor_b0", "tensor_w1")
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def draw(seed, shapes=TREE, dtype=torch.float64):
    generator = fold_in(seed)
    return {k: torch.randn(s, generator=generator, dtype=dtype) for k, s in shapes.items()}


def trained(dtype=torch.float64):
    """Meta-parameters none of which is zero: every network has a say."""
    generator, th = fold_in(1), trees.cast(basis_mlp().init(fold_in(2)), dtype)
    return trees.map(lambda x: x + 0.2 * torch.randn(x.shape, generator=generator).to(dtype), th)


def run(rule, th, params, gradients, num_steps):
    hidden = rule.init_hidden(th, params, num_steps=num_steps)
    for g in gradients:
        params, hidden = rule.step(th, params, g, hidden)
    return params, hidden


def rms(x):
    return x.square().mean().sqrt()


SCHEDULE_UNITS, GATE_UNITS = np.array([5.0, 5, 5, 1]), np.array([5.0, 5, 5, 5, 5, 1])


# -- the same program in NumPy ---------------------------------------------------------------------


def numpy_orthogonal(x, iterations):
    a = x.reshape(len(x), -1)
    flip = a.shape[0] > a.shape[1]
    a = a.T if flip else a
    a = a / (math.sqrt((a**2).sum()) + 1e-8)
    for _ in range(iterations):
        b = a @ a.T
        a = 3.4445 * a - 4.7750 * b @ a + 2.0315 * b @ b @ a
    a = a.T if flip else a
    return a.reshape(x.shape) * math.sqrt(max(a.shape))


def numpy_training(th, p, gradients, total, lr, iterations):
    """The parameters of one tensor after each step."""
    th, kind = {k: v.numpy() for k, v in th.items()}, 0 if p.ndim >= 2 else 1
    of = lambda x: math.sqrt((x**2).mean() + 1e-24)
    scale, signal, growth = min(max(of(p), 0.02), 1.0), 0.0, 0.0
    m, n, v, out = 0 * p, 0 * p, 0 * p, []
    for t, g in enumerate(gradients):
        done = t / total
        time = [done, done**2, math.exp(-10 * done), math.exp(-t / 10), math.exp(-t / 50)]
        seen = np.array([*time, 1 - kind, signal, growth, math.log(p.size) / 5 - 1])
        hidden = np.maximum(seen @ th["tensor_w0"] + th["tensor_b0"], 0)
        told = hidden @ th["tensor_w1"]
        rate, a, b, gates, bias = told[0], told[1], told[2], told[3:9], told[9:]

        warm, power, floor, longer = (min(x, 2) for x in SCHEDULE_UNITS * th["schedule"])
        end = 0.02 * math.exp(floor)
        size = 0.01 * lr * math.exp(5 * th["log_lr"][kind] + 2 * math.tanh(rate / 2))
        size *= math.sqrt(scale / 0.1) * (total / 200) ** longer
        size *= min(1, (t + 1) / (1 + 0.05 * math.exp(warm) * total))
        size *= (1 - done * (1 - end)) ** math.exp(power)

        m, n, v = 0.9 * m + 0.1 * g, 0.98 * n + 0.02 * g, 0.98 * v + 0.02 * g * g
        m1, n1, v1 = (x / (1 - d ** (t + 1)) for x, d in ((m, 0.9), (n, 0.98), (v, 0.98)))
        root = 1 / np.sqrt(v1 + 1e-8 * v1.mean())
        o = numpy_orthogonal(m1 + a * n1 + b * g, iterations) if kind == 0 else m1 * root
        rows = [g * root, m1 * root, n1 * root, m1 / of(m1), o, p / (of(p) + 1e-6)]
        rows += [np.log(v / v.mean() + 1e-6) / 3, abs(m1 * root), np.ones_like(p)]
        delta = np.zeros_like(p)
        for i in np.ndindex(p.shape):
            x = np.clip([row[i] for row in rows], -5, 5)
            first = x[:8] @ th["w0"][:8] + th["w0"][8] + bias
            own = np.maximum(first, 0) @ th["w1"]
            delta[i] = x[:6] @ (own + gates + GATE_UNITS * th["gates"][kind])
        growth = min(max(math.log(max(of(p), 1e-3) / scale), -3), 3)
        signal = of(m1 * root)
        p = p - size * delta / math.sqrt((delta**2).mean() + 1e-12)
        out.append(p)
    return out


@pytest.mark.parametrize(("lr", "iterations"), [(1.0, 4), (30.0, 2)])
def test_it_is_the_program_in_numpy(lr, iterations):
    total, th, rule = 7, trained(), basis_mlp(lr, iterations)
    params = draw(10, ODD)
    steps = [draw(11 + t, ODD) for t in range(total)]
    want = {
        k: numpy_training(th, p.numpy(), [g[k].numpy() for g in steps], total, lr, iterations)
        for k, p in params.items()
        if p.numel()
    }
    hidden = rule.init_hidden(th, params, num_steps=total)
    for t, g in enumerate(steps):
        params, hidden = rule.step(th, params, g, hidden)
        for k, x in want.items():
            torch.testing.assert_close(params[k], torch.from_numpy(np.asarray(x[t])), **CLOSE)


# -- the untrained rule and the size of a step -----------------------------------------------------


def schedule(t, num_steps):
    """Of the untrained rule: a rise over a twentieth of the steps, a fall to 2 %."""
    rise = min((t + 1) / (1 + 0.05 * num_steps), 1)
    return 0.01 * rise * (1 - 0.98 * min(t / num_steps, 1)) * (num_steps / 200) ** -0.4


def sizes(rule, th, params, num_steps, steps):
    """Root mean square of each update, by leaf."""
    hidden, found = rule.init_hidden(th, params, num_steps=num_steps), []
    for t in range(steps):
        delta, hidden = rule.update(th, params, draw(20 + t), hidden)
        found.append({k: rms(d) for k, d in delta.items()})
        params = fmeta.optimizer.apply_updates(params, delta)
    return {k: torch.stack([row[k] for row in found]) for k in params}


def test_the_untrained_rule_is_adam_for_vectors():
    """Whatever the random weights: Adam's direction, scaled to the schedule."""
    p = torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64)
    m = v = torch.zeros(3, dtype=torch.float64)
    start, rule = rms(p), basis_mlp()
    th = trees.cast(rule.init(fold_in(4)), torch.float64)
    hidden = rule.init_hidden(th, p, num_steps=30)
    for t in range(30):
        g = torch.randn(3, generator=fold_in(5, t), dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
        direction = (m / (1 - 0.9 ** (t + 1))) / (v / (1 - 0.98 ** (t + 1))).sqrt()
        want = -schedule(t, 30) * (start / 0.1).sqrt() * direction / rms(direction)
        delta, hidden = rule.update(th, p, g, hidden)
        torch.testing.assert_close(delta, want, rtol=1e-6, atol=1e-9)
        p = p + delta


def test_untrained_a_matrix_moves_along_adam_and_muon_evenly():
    rule, g = basis_mlp(), torch.randn(4, 6, generator=fold_in(23), dtype=torch.float64)
    th = trees.cast(rule.init(), g.dtype)
    got, _ = rule.update(th, g, g, rule.init_hidden(th, g, num_steps=100))
    o = torch.from_numpy(numpy_orthogonal(g.numpy(), 4))
    want = -(g.sign() + o)  # the first momentum over the root of the first second moment
    torch.testing.assert_close(got / rms(got), want / rms(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 10, 100])
def test_steps_have_the_size_of_the_schedule(num_steps):
    th = trees.cast(basis_mlp().init(), torch.float64)
    params = draw(40)
    found = sizes(basis_mlp(0.5), th, params, num_steps, num_steps + 20)
    want = torch.tensor([0.5 * schedule(t, num_steps) for t in range(num_steps + 20)])
    for k, p in params.items():
        scale = (rms(p).clamp(0.02, 1) / 0.1).sqrt()
        torch.testing.assert_close(found[k], want.double() * scale, rtol=1e-6, atol=0)
        # After the horizon the last rate goes on.
        assert (found[k][num_steps:].diff().abs() < 1e-7 * found[k][-1]).all()


def test_numbers_of_the_schedule_are_in_units_of_5():
    th = trees.cast(basis_mlp().init(), torch.float64)
    th["log_lr"] = torch.tensor([math.log(2.0), math.log(3.0)], dtype=torch.float64) / 5
    warm, power, floor = math.log(4.0), math.log(2.0), math.log(5.0)
    th["schedule"] = torch.tensor(
        [warm, power, floor, -0.5], dtype=torch.float64
    ) / torch.from_numpy(SCHEDULE_UNITS)
    params = draw(41)
    found = sizes(basis_mlp(), th, params, 50, 60)
    for k, p in params.items():
        t = torch.arange(60, dtype=torch.float64)
        fall = (1 - (t / 50).clamp(max=1) * (1 - 0.1)) ** 2
        want = 0.01 * ((t + 1) / (1 + 0.2 * 50)).clamp(max=1) * fall * (50 / 200) ** -0.5
        want = want * (2 if p.ndim >= 2 else 3) * (rms(p).clamp(0.02, 1) / 0.1).sqrt()
        torch.testing.assert_close(found[k], want, rtol=1e-6, atol=0)


def test_networks_change_a_rate_by_a_bounded_factor_at_any_time():
    """At most exp(2), however wild their weights and however late it is."""
    rule, start = basis_mlp(), trees.cast(basis_mlp().init(), torch.float64)
    wild = {**start, **{k: 5 * trained()[k] for k in NETWORKS}}
    params, factors = draw(42), []
    for t in (0, 10, 10**3, 10**6):
        hidden = rule.init_hidden(wild, params, num_steps=1000)
        hidden = hidden._replace(shared={**hidden.shared, "t": torch.tensor(float(t)).double()})
        got, want = (rule.update(th, params, draw(43), hidden)[0] for th in (wild, start))
        factors += [(rms(got[k]) / rms(want[k])).log() for k in params]
    factors = torch.stack(factors)
    assert factors.abs().max() <= 2 + 1e-6
    assert factors.std() > 0.5


def test_lr_is_a_factor_and_may_be_a_tensor():
    th, params, grads = trained(), draw(44), draw(45)

    def size(lr):
        rule = basis_mlp(lr)
        delta, _ = rule.update(th, params, grads, rule.init_hidden(th, params, num_steps=5))
        return sum(d.square().sum() for d in delta.values())

    lr = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(size(lr), 4 * size(1.0))
    torch.testing.assert_close(grad(size)(lr), 4 * size(1.0))


def test_the_untrained_rule_trains_on_digits():
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    apply, params, buffers = fmeta.functionalize(net)
    rows = torch.randint(len(x), (50, 128), generator=fold_in(12))
    loss = lambda p, i: nn.functional.cross_entropy(apply(p, buffers, x[i]), y[i])
    rule = basis_mlp()
    losses = fmeta.unroll(rule, loss, rule.init(), params, rows, num_steps=50).losses
    assert losses[:3].mean() > 1.8
    assert losses[-5:].mean() < 0.2


# -- what it does not know -------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_the_loss_does_not_matter(scale, dtype):
    rule, th = basis_mlp(), trained(dtype)

    def end(scale):
        params = draw(50, dtype=dtype)
        hidden = rule.init_hidden(th, params, num_steps=6)
        for t in range(6):
            grads = {k: scale * g for k, g in draw(51 + t, dtype=dtype).items()}
            params, hidden = rule.step(th, params, grads, hidden)
        return params

    torch.testing.assert_close(end(scale), end(1.0), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("factor", [0.25, 0.5])
def test_steps_grow_with_the_root_of_the_parameters(factor):
    rule, th, params, grads = basis_mlp(), trained(), draw(60), draw(61)
    params = {k: p / (2 * rms(p)) for k, p in params.items()}  # between the bounds .02 and 1

    def delta(params):
        return rule.update(th, params, grads, rule.init_hidden(th, params, num_steps=5))[0]

    small, whole = delta({k: factor * p for k, p in params.items()}), delta(params)
    for k in params:
        torch.testing.assert_close(small[k], factor**0.5 * whole[k], rtol=1e-4, atol=1e-6)


def at(rule, th, p, t, num_steps):
    """The next update at step ``t`` of a training."""
    start = rule.init_hidden(th, p, num_steps=num_steps)
    shared = {**start.shared, "t": torch.as_tensor(t, dtype=p.dtype)}
    return rule.update(th, p, p, Hidden(start.leaves, shared))[0]


def test_far_longer_trainings_show_the_networks_nothing_new():
    """Half-way, a training of a million steps is that of ten thousand but for the step size."""
    th, rule = trained(), basis_mlp()
    p = torch.randn(3, 4, generator=fold_in(34), dtype=torch.float64)
    longer = th["schedule"][3].item()
    short, long = at(rule, th, p, 5_000, 10_000), at(rule, th, p, 500_000, 1_000_000)
    torch.testing.assert_close(long, short * 100**longer, **CLOSE)


def test_past_the_horizon_the_last_rate_stays():
    th, rule = trained(), basis_mlp()
    p = torch.randn(3, 4, generator=fold_in(36), dtype=torch.float64)
    end, past = at(rule, th, p, 3000, 3000), at(rule, th, p, 30_000, 3000)
    torch.testing.assert_close(past, end, **CLOSE)
    assert rms(end) > 0


@pytest.mark.parametrize("axis", ["w", "conv"])
def test_rows_and_columns_have_no_order(axis):
    """Of a matrix the rule knows which coordinates share a row or column, not their places."""
    permutation_equivariant(basis_mlp(), {axis: draw(37)[axis]}, equivariance="axes", steps=3)


def test_tensors_do_not_see_each_other():
    rule, th, params, grads = basis_mlp(), trained(), draw(62), draw(63)
    together, _ = rule.step(th, params, grads, rule.init_hidden(th, params, num_steps=5))
    for k, p in params.items():
        alone, _ = rule.step(th, p, grads[k], rule.init_hidden(th, p, num_steps=5))
        torch.testing.assert_close(together[k], alone)


# -- horizons and trees ----------------------------------------------------------------------------


def test_no_horizon_is_refused_by_name():
    rule = basis_mlp()
    with pytest.raises(ValueError, match=r"needs num_steps.*init_hidden\(.*num_steps=\.\.\.\)"):
        rule.init_hidden(rule.init(), draw(80))


def test_tasks_of_several_horizons_under_vmap_are_each_alone():
    rule, th, params = basis_mlp(), trained(), draw(81)
    gradients = [draw(82 + t) for t in range(3)]
    end = lambda num_steps: run(rule, th, params, gradients, num_steps)[0]

    horizons = [3, 20, 400]
    got = vmap(end)(torch.tensor(horizons))
    for i, n in enumerate(horizons):
        torch.testing.assert_close({k: x[i] for k, x in got.items()}, end(n))
        torch.testing.assert_close(end(torch.tensor(n)), end(n))


def test_a_leaf_without_gradient_keeps_its_state_while_time_goes_on():
    rule, th, params = basis_mlp(), trained(), draw(85)
    hidden = rule.init_hidden(th, params, num_steps=5)
    params, hidden = rule.step(th, params, draw(86), hidden)
    new, after = rule.step(th, params, {**draw(87), "conv": None}, hidden)
    assert new["conv"] is params["conv"]
    for k, x in hidden.leaves["conv"].items():
        assert after.leaves["conv"][k] is x
    assert after.leaves["b"]["count"] == after.shared["t"] == 2


def test_leaves_of_other_optimizers_and_no_leaves_at_all():
    params = draw(88)
    rules = {"mixture": basis_mlp(), "adam": adam(0.1)}
    for first in ("b", "w"):  # "b" is the first of the leaves
        label = lambda path, p, first=first: "adam" if path == first else "mixture"
        both = fmeta.partition(rules, label)
        th = both.init()
        new, _ = both.step(th, params, draw(89), both.init_hidden(th, params, num_steps=4))
        rest = {k: None if k == first else p for k, p in params.items()}
        rule, own = rules["mixture"], th["mixture"]
        start = rule.init_hidden(own, rest, num_steps=4)
        alone, _ = rule.step(own, rest, {**draw(89), first: None}, start)
        assert all(torch.equal(new[k], p) for k, p in alone.items() if p is not None)
    rule = basis_mlp()
    assert rule.step(rule.init(), {}, {}, rule.init_hidden(rule.init(), {}, num_steps=4))[0] == {}


# -- derivatives -----------------------------------------------------------------------------------


def meta_loss(rule, params, targets, **options):
    batches = {k: torch.stack([v, v + 0.1, v - 0.2]) for k, v in targets.items()}
    loss = lambda p, t: sum(((p[k] - t[k]) ** 2).sum() for k in p)
    return lambda th: fmeta.unroll(rule, loss, th, params, batches, **options).losses.sum()


def test_meta_gradient_is_the_finite_difference():
    rule, th = basis_mlp(lr=3.0), trained()
    meta = meta_loss(rule, draw(70), draw(71))
    gradient, e = grad(meta)(th), 1e-6
    for name in th:
        along = torch.randn(th[name].shape, generator=fold_in(6), dtype=torch.float64)
        up, down = (meta({**th, name: th[name] + s * along}) for s in (e, -e))
        got = (gradient[name] * along).sum()
        torch.testing.assert_close(got, (up - down) / (2 * e), rtol=1e-5, atol=1e-8, msg=name)
        assert gradient[name].any(), name


def test_first_order_takes_the_gradients_for_constants():
    rule, th, params, targets = basis_mlp(lr=3.0), trained(), draw(70), draw(71)

    def by_hand(th):
        p, total = params, 0.0
        hidden = rule.init_hidden(th, p, num_steps=3)
        for shift in (0.0, 0.1, -0.2):
            off = {k: p[k] - targets[k] - shift for k in p}
            total = total + sum(x.square().sum() for x in off.values())
            p, hidden = rule.step(th, p, {k: 2 * x.detach() for k, x in off.items()}, hidden)
        return total

    got = grad(meta_loss(rule, params, targets, first_order="gradients"))(th)
    torch.testing.assert_close(got, grad(by_hand)(th))
    second = grad(meta_loss(rule, params, targets))(th)
    assert (second["log_lr"] - got["log_lr"]).abs().max() > 1e-3 * got["log_lr"].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("width", [0.0, 1.0])
def test_gradients_of_any_size_keep_everything_finite(dtype, scale, width):
    """The gradients depend on the parameters, so that an infinite derivative is not hidden."""
    rule, th = basis_mlp(), trained(dtype)
    p = {k: width * x for k, x in draw(72, ODD, dtype).items()}
    shift = draw(73, ODD, dtype)

    def meta(th, p):
        hidden = rule.init_hidden(th, p, num_steps=5)
        for _ in range(2):  # a third multiplies the 1e12 of a tensor of zeros out of float32
            p, hidden = rule.step(th, p, {k: scale * (p[k] + shift[k]) for k in p}, hidden)
        return sum((x + 1).square().sum() for x in p.values())

    assert meta(th, p).isfinite()
    for x in trees.leaves(grad(meta, argnums=(0, 1))(th, p)):
        assert x.isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_without_a_gradient_to_speak_of_untrained_vectors_stay(size):
    rule = basis_mlp()
    p = torch.ones(5)
    new, _ = run(rule, rule.init(), p, [size * p], 10)
    torch.testing.assert_close(new, p)


# -- kinds of tensors, weights, files, arguments ---------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_odd_leaves_on_meta_and_in_other_dtypes(dtype):
    rule, th, p = basis_mlp(), basis_mlp().init(), draw(90, ODD, dtype)
    hidden = rule.init_hidden(th, p, num_steps=3)
    q, after = rule.step(th, p, p, hidden)
    assert all(x.isfinite().all() for x in trees.leaves((q, after)))
    assert {k: x.dtype for k, x in q.items()} == dict.fromkeys(ODD, dtype)
    on_meta = trees.map(lambda x: x.to("meta"), (th, p, p, hidden))
    for got, want in zip(trees.leaves(rule.step(*on_meta)), trees.leaves((q, after)), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


def test_steps_of_bfloat16_parameters_are_those_in_float32():
    rule, th = basis_mlp(), trained(torch.float32)
    low, grads = draw(91, dtype=torch.bfloat16), draw(92, dtype=torch.bfloat16)
    high = trees.cast(low, torch.float32)
    got, _ = rule.step(th, low, grads, rule.init_hidden(th, low, num_steps=3))
    want, _ = rule.step(
        th, high, trees.cast(grads, torch.float32), rule.init_hidden(th, high, num_steps=3)
    )
    assert all(torch.equal(got[k], want[k].to(torch.bfloat16)) for k in got)


def test_the_weights_have_the_shapes_of_the_docstring():
    assert {k: tuple(x.shape) for k, x in basis_mlp().init().items()} == {
        "log_lr": (2,),
        "schedule": (4,),
        "gates": (2, 6),
        "w0": (9, 12),
        "w1": (12, 6),
        "tensor_w0": (9, 12),
        "tensor_b0": (12,),
        "tensor_w1": (12, 21),
    }


def test_weights_follow_the_generator_and_give_nothing_at_the_start():
    one, same, other = (basis_mlp().init(fold_in(i)) for i in (1, 1, 2))
    assert trees.paths(one) == trees.paths(trained())
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert {k for k in one if not torch.equal(one[k], other[k])} == {"w0", "tensor_w0"}
    assert not torch.cat([one["w1"].flatten(), one["tensor_w1"].flatten()]).any()


def test_weights_and_arguments_come_back_from_a_file(tmp_path):
    th, params, grads = trained(torch.float32), draw(93), draw(94)
    fmeta.pretrained.save(tmp_path / "w.safetensors", "basis_mlp", th, lr=0.5, ns_steps=3)
    rule, loaded = fmeta.pretrained.load(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[k], th[k]) for k in th)
    ends = []
    for one, own in ((rule, loaded), (basis_mlp(0.5, 3), th)):
        ends.append(one.step(own, params, grads, one.init_hidden(own, params, num_steps=3))[0])
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"lr must be not negative and finite, got -1\.0"),
        ({"lr": float("nan")}, "lr must be not negative"),
        ({"ns_steps": 0}, "ns_steps must be an integer of at least 1, got 0"),
    ],
)
def test_senseless_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        basis_mlp(**arguments)


def test_weights_on_another_device_are_refused_by_path():
    rule, params = basis_mlp(), draw(95)
    hidden = rule.init_hidden(rule.init(), params, num_steps=3)
    with pytest.raises(ValueError, match=r"opt_params at path .* are on meta"):
        rule.step(trees.map(lambda x: x.to("meta"), rule.init()), params, params, hidden)
