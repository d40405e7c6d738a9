"""The three lifts against explicit loops over leaves and coordinates."""

import pytest
import torch
from torch import nn
from torch.func import grad

import fmeta
from fmeta import optimizers, trees
from fmeta._lift import lift
from fmeta.random import fold_in

DOUBLE = {"dtype": torch.float64}
# four leaves of one shape are stacked, the others go alone; a scalar and an empty one among them
SHAPES = {"a": (2, 3), "b": (3,), "c": (3,), "d": (3,), "e": (3,), "f": (), "g": (0,), "h": (3, 2)}
SEEDS = {k: i for i, k in enumerate(SHAPES)}
STEPS = 3


def start(dtype=torch.float64):
    return {
        k: torch.randn(s, generator=fold_in(0, SEEDS[k]), **DOUBLE).to(dtype)
        for k, s in SHAPES.items()
    }


def gradients(t, absent=()):
    return {
        k: None if k in absent else torch.randn(s, generator=fold_in(1, t, SEEDS[k]), **DOUBLE)
        for k, s in SHAPES.items()
    }


def trajectory(rule, th, absent=lambda t: (), **extra):
    params = start()
    hidden = rule.init_hidden(th, params)
    for t in range(STEPS):
        params, hidden = rule.step(th, params, gradients(t, absent(t)), hidden, **extra)
    return params, hidden


def alternating(t):
    return ["b", "f", "h"] if t == 1 else []


def close(got, want, tol=1e-12):
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=tol, atol=tol, msg=k)


def made(module):
    """A module with fixed random parameters, in float64."""
    module = module.to(torch.float64)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=fold_in(2, i), **DOUBLE))
    return module


def by_coordinate(delta_of, state, absent=lambda t: ()):
    """Each coordinate by itself: ``delta_of(param, grad, state) -> (delta, state)``."""
    params = {k: p.clone() for k, p in start().items()}
    states = {k: [state() for _ in range(p.numel())] for k, p in params.items()}
    for t in range(STEPS):
        for k, g in gradients(t, absent(t)).items():
            flat = params[k].view(-1)
            for i in range(flat.numel() if g is not None else 0):
                delta, states[k][i] = delta_of(flat[i].clone(), g.view(-1)[i], states[k][i])
                flat[i] += delta
    return params


# --- coordinatewise -----------------------------------------------------------------------------


class Momentum:
    """A rule of one coordinate with a state of shape (2,)."""

    def init(self, generator=None):
        return {"w": torch.tensor([-0.1, 0.05, -0.02], **DOUBLE)}

    def init_hidden(self, th, p):
        assert p.shape == ()
        return {"m": torch.zeros(2, dtype=p.dtype), "n": torch.zeros((), dtype=torch.int64)}

    def update(self, th, p, g, h):
        assert p.shape == g.shape == h["n"].shape == ()
        n = h["n"] + 1
        m = 0.9 * h["m"] + torch.stack([g, g * g])
        return torch.stack([g, p, m.sum() / n]) @ th["w"], {"m": m, "n": n}


class MomentumByStep:
    """The same rule, written as `step`."""

    init, init_hidden = Momentum.init, Momentum.init_hidden

    def step(self, th, p, g, h):
        delta, h = Momentum().update(th, p, g, h)
        return p + delta, h


def momentum_by_hand(absent=lambda t: ()):
    rule = Momentum()
    th = rule.init()
    return by_coordinate(
        lambda p, g, h: rule.update(th, p, g, h),
        lambda: rule.init_hidden(th, torch.zeros((), **DOUBLE)),
        absent,
    )


@pytest.mark.parametrize("kind", [Momentum, MomentumByStep])
@pytest.mark.parametrize("absent", [lambda t: (), alternating], ids=["all", "some None"])
def test_coordinatewise_equals_the_loop_over_coordinates(kind, absent):
    rule = fmeta.coordinatewise(kind())
    close(trajectory(rule, rule.init(), absent)[0], momentum_by_hand(absent))


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_chunks_change_nothing(size):
    whole, parts = (
        fmeta.coordinatewise(Momentum()),
        fmeta.coordinatewise(Momentum(), chunk_size=size),
    )
    close(trajectory(parts, parts.init())[0], trajectory(whole, whole.init())[0])


def test_the_state_is_shaped_like_its_leaf():
    rule = fmeta.coordinatewise(Momentum())
    hidden = trajectory(rule, rule.init())[1]
    assert {k: tuple(h["m"].shape) for k, h in hidden.leaves.items()} == {
        k: (*s, 2) for k, s in SHAPES.items()
    }
    assert (hidden.leaves["h"]["n"] == STEPS).all()


def test_a_linear_module_equals_the_hand_written_rule():
    net = made(nn.Linear(2, 1, bias=False))
    by_module = fmeta.coordinatewise(net)
    w = net.weight.detach()[0]
    want = by_coordinate(lambda p, g, h: (w[0] * g + w[1] * p, h), dict)
    close(trajectory(by_module, by_module.init())[0], want)
    linear = optimizers.linear()
    close(trajectory(linear, {"weight": net.weight.detach()})[0], want)


def test_features_of_ones_own():
    net = made(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    rule = fmeta.coordinatewise(net, features=lambda p, g: torch.stack([g, p, g * p]))
    with torch.no_grad():
        want = by_coordinate(lambda p, g, h: (net(torch.stack([g, p, g * p]))[0], h), dict)
    close(trajectory(rule, rule.init())[0], want)


class Custom(nn.Module):
    """(features, state) -> (out, state), with a state of any structure."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2 + 3 + 1, 1 + 3)

    def forward(self, x, state):
        wide, one = state
        out = self.net(torch.cat([x, wide, one]))
        return out[:1], (torch.tanh(out[1:]), one + 1)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2 + 3, 4)

    def forward(self, x, state):
        out = self.net(torch.cat([x, state]))
        return out[:1], torch.tanh(out[1:])


def zeros(*sizes):
    return lambda: tuple(torch.zeros(n, **DOUBLE) for n in sizes)


NETS = {
    "int": (Gate, 3, lambda: torch.zeros(3, **DOUBLE), lambda out: out),
    "tuple": (Custom, (3, 1), zeros(3, 1), lambda out: out),
    "lstm cell": (lambda: nn.LSTMCell(2, 3), None, zeros(3, 3), lambda out: (out[0], out)),
    "gru cell": (
        lambda: nn.GRUCell(2, 3),
        None,
        lambda: torch.zeros(3, **DOUBLE),
        lambda out: (out, out),
    ),
    "rnn cell": (
        lambda: nn.RNNCell(2, 3),
        None,
        lambda: torch.zeros(3, **DOUBLE),
        lambda out: (out, out),
    ),
}


@pytest.mark.parametrize("absent", [lambda t: (), alternating], ids=["all", "some None"])
@pytest.mark.parametrize("name", NETS)
def test_recurrent_modules_equal_the_loop(name, absent):
    make, hidden, state, read = NETS[name]
    net = made(make())
    rule = fmeta.coordinatewise(net, hidden=hidden)

    def one(p, g, h):
        with torch.no_grad():
            out, h = read(net(torch.stack([g, p]), h))
        return out[0], h

    close(trajectory(rule, rule.init(), absent)[0], by_coordinate(one, state, absent))


def test_a_dict_of_sizes_gives_a_state_of_dicts():
    class Net(nn.Module):
        def forward(self, x, state):
            return x[:1], {"u": state["u"] + 1, "v": state["v"]}

    rule = fmeta.coordinatewise(Net(), hidden={"u": 2, "v": 1})
    state = trajectory(rule, rule.init())[1].leaves["h"]["state"]
    assert state["u"].shape == (3, 2, 2)
    assert (state["u"] == STEPS).all()


def test_the_modules_own_parameters_are_the_start_and_stay_untouched():
    net = made(nn.Linear(2, 1))
    rule = fmeta.coordinatewise(net)
    assert set(rule.init()) == {"weight", "bias"}
    before = net.weight.detach().clone()
    trajectory(rule, rule.init())
    assert torch.equal(net.weight, before)
    assert torch.equal(rule.init(torch.Generator())["weight"], before)


def test_a_module_rule_is_learned_by_grad():
    rule = fmeta.coordinatewise(made(nn.LSTMCell(2, 3)))
    loss = lambda p, b: p.square().sum()
    meta = lambda th: fmeta.unroll(
        rule, loss, th, torch.ones(2, **DOUBLE), torch.zeros(4)
    ).losses.sum()
    slope = grad(meta)(rule.init())
    eps = {k: torch.randn(v.shape, generator=fold_in(3), **DOUBLE) for k, v in rule.init().items()}
    moved = lambda e: meta({k: v + e * eps[k] for k, v in rule.init().items()})
    numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
    total = sum((slope[k] * eps[k]).sum() for k in eps)
    torch.testing.assert_close(total, numeric, rtol=1e-6, atol=1e-9)


def test_float32_rules_serve_parameters_of_any_dtype():
    rule = fmeta.coordinatewise(made(nn.Linear(2, 1)).float())
    p = {"h": torch.ones(2, dtype=torch.bfloat16), "s": torch.ones(3), "d": torch.ones(4, **DOUBLE)}
    delta, _ = rule.update(rule.init(), p, p, rule.init_hidden(rule.init(), p))
    assert [delta[k].dtype for k in p] == [torch.float32, torch.float32, torch.float64]
    torch.testing.assert_close(delta["h"][0], delta["s"][0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fmeta.coordinatewise(object()), TypeError, "has no "),
        (lambda: fmeta.coordinatewise(Momentum(), hidden=3), TypeError, "go with an nn.Module"),
        (
            lambda: fmeta.coordinatewise(made(nn.Linear(2, 1)), hidden=0),
            ValueError,
            "positive sizes.*0",
        ),
        (
            lambda: fmeta.coordinatewise(Momentum(), chunk_size=0),
            ValueError,
            "chunk_size.*at least",
        ),
        (lambda: fmeta.tensorwise(nn.Linear(2, 1)), TypeError, r"needs features\(param, grad"),
        (lambda: fmeta.tensorwise(object()), TypeError, "has no"),
        (lambda: fmeta.tensorwise(Momentum(), features=len), TypeError, "go with an nn.Module"),
        (lambda: fmeta.treewise(Momentum()), TypeError, "has no summary"),
    ],
)
def test_what_is_no_rule_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_module_that_returns_no_state_is_refused():
    class Stateless(nn.Module):
        def forward(self, x, state):
            return x

    net = fmeta.coordinatewise(Stateless(), hidden=3)
    with pytest.raises(ValueError, match=r"must return \(out, state\).*got a Tensor"):
        trajectory(net, net.init())


@pytest.mark.parametrize("lifted", [fmeta.coordinatewise, fmeta.tensorwise])
def test_a_delta_of_another_shape_is_named(lifted):
    class Wrong(Momentum):
        def init_hidden(self, th, p):
            return {}

        def update(self, th, p, g, h):
            return torch.stack([p, p]), h

    rule = lifted(Wrong())
    with pytest.raises(ValueError, match="must return a tensor of the parameter's own shape"):
        trajectory(rule, rule.init())


@pytest.mark.parametrize("lifted", [fmeta.coordinatewise, fmeta.tensorwise])
def test_a_state_that_is_no_dict_is_named(lifted):
    class Wrong(Momentum):
        def init_hidden(self, th, p):
            return torch.zeros(2)

    rule = lifted(Wrong())
    with pytest.raises(TypeError, match=r"init_hidden must give a dict.*got a Tensor"):
        rule.init_hidden(rule.init(), start())


# --- tensorwise ---------------------------------------------------------------------------------


class Normalised:
    """A rule of one tensor with a state of the leaf's shape and one of its own."""

    def init(self, generator=None):
        return {"lr": torch.tensor(0.3, **DOUBLE)}

    def init_hidden(self, th, p):
        return {"m": torch.zeros_like(p), "norm": torch.ones((), dtype=p.dtype)}

    def update(self, th, p, g, h):
        m = 0.5 * h["m"] + g
        norm = 0.9 * h["norm"] + m.square().sum()
        return -th["lr"] * m / norm.sqrt(), {"m": m, "norm": norm}


def tensor_by_tensor(rule, th, absent=lambda t: ()):
    params = start()
    states = {k: rule.init_hidden(th, p) for k, p in params.items()}
    for t in range(STEPS):
        for k, g in gradients(t, absent(t)).items():
            if g is not None:
                delta, states[k] = rule.update(th, params[k], g, states[k])
                params[k] = params[k] + delta
    return params


@pytest.mark.parametrize("absent", [lambda t: (), alternating], ids=["all", "some None"])
def test_tensorwise_equals_the_loop_over_tensors(absent):
    rule = fmeta.tensorwise(Normalised())
    want = tensor_by_tensor(Normalised(), Normalised().init(), absent)
    close(trajectory(rule, rule.init(), absent)[0], want)


def test_tensorwise_by_step():
    inner = Normalised()

    class Step:
        init, init_hidden = inner.init, inner.init_hidden

        @staticmethod
        def step(th, p, g, h):
            delta, h = inner.update(th, p, g, h)
            return p + delta, h

    rule = fmeta.tensorwise(Step)
    want = tensor_by_tensor(inner, inner.init())
    close(trajectory(rule, rule.init())[0], want)


def test_tensorwise_module_with_accumulators_features_and_post():
    net = made(nn.Linear(2, 1))
    accumulators = (
        lambda p: {"v": torch.zeros_like(p)},
        lambda p, g, h: {"v": 0.9 * h["v"] + g * g},
    )
    features = lambda p, g, h: torch.stack([g, h["v"]], -1)
    post = lambda d, p: d / (1 + p.norm())
    rule = fmeta.tensorwise(net, accumulators=accumulators, features=features, post=post)

    params, v = start(), {k: torch.zeros_like(p) for k, p in start().items()}
    for t in range(STEPS):
        for k, g in gradients(t).items():
            v[k] = 0.9 * v[k] + g * g
            with torch.no_grad():
                delta = net(torch.stack([g, v[k]], -1))[..., 0]
            params[k] = params[k] + delta / (1 + params[k].norm())
    close(trajectory(rule, rule.init())[0], params)


def test_tensorwise_gets_what_it_needs():
    class Needy(Normalised):
        needs = frozenset({"loss", "noise", "num_steps"})

        def init_hidden(self, th, p, *, num_steps):
            return {"n": torch.as_tensor(num_steps, dtype=p.dtype)}

        def update(self, th, p, g, h, *, loss, extras):
            return -loss * extras["noise"] * h["n"] * g, h

    rule = fmeta.tensorwise(Needy())
    params, g = start(), gradients(0)
    with pytest.raises(ValueError, match=r"needs num_steps.*init_hidden\(.*num_steps=\.\.\.\)"):
        rule.init_hidden(rule.init(), params)
    hidden = rule.init_hidden(rule.init(), params, num_steps=4)
    with pytest.raises(ValueError, match="needs the loss"):
        rule.step(rule.init(), params, g, hidden, extras={"noise": 0.5})
    with pytest.raises(ValueError, match="needs noise"):
        rule.step(rule.init(), params, g, hidden, loss=torch.tensor(2.0))
    new, _ = rule.step(
        rule.init(), params, g, hidden, loss=torch.tensor(2.0), extras={"noise": 0.5}
    )
    close(new, {k: p - 4 * g[k] for k, p in params.items()})


# --- stacking -----------------------------------------------------------------------------------


def counting(elementwise):
    """delta = -rate * (1 + count) * g, count of each leaf by itself."""

    def update(th, p, g, h, rate):
        return -rate * (1 + h["count"].to(p.dtype)) * g, {"count": h["count"] + 1}

    rates = {k: 0.1 * (1 + i) for i, k in enumerate(SHAPES)}
    return lift(
        lambda generator=None: {},
        lambda th, p: {"count": torch.zeros((), dtype=torch.int64)},
        update,
        hypers=lambda th: {"rate": rates},
        elementwise=elementwise,
    ), rates


@pytest.mark.parametrize("elementwise", [True, False])
def test_stacked_leaves_keep_counts_and_rates_of_their_own(elementwise):
    rule, rates = counting(elementwise)
    absent = lambda t: ["c", "e"] if t == 0 else ["c", "f"] if t == 1 else []
    got, hidden = trajectory(rule, {}, absent)
    want, counts = start(), dict.fromkeys(SHAPES, 0)
    for t in range(STEPS):
        for k, g in gradients(t, absent(t)).items():
            if g is not None:
                want[k] = want[k] - rates[k] * (1 + counts[k]) * g
                counts[k] += 1
    close(got, want)
    assert {k: int(h["count"]) for k, h in hidden.leaves.items()} == counts


@pytest.mark.parametrize("name", ["sgd", "adam", "lstm", "normalized_mlp", "linear", "rmsprop"])
def test_leaves_together_equal_leaves_one_by_one(name):
    rule = optimizers.BUILDERS[name]()
    th = trees.cast(rule.init(), torch.float64)
    # the empty leaf's features have no mean
    keys = [k for k in SHAPES if k != "g"]
    params = {k: p for k, p in start().items() if k in keys}
    grads = {k: g for k, g in gradients(0).items() if k in keys}
    together, _ = rule.step(th, params, grads, rule.init_hidden(th, params))
    for k in keys:
        alone = {k: params[k]}
        one, _ = rule.step(th, alone, {k: grads[k]}, rule.init_hidden(th, alone))
        torch.testing.assert_close(together[k], one[k], rtol=1e-9, atol=1e-12)


# --- treewise -----------------------------------------------------------------------------------


class Hierarchy:
    """A state for each coordinate, each tensor and the model; tensors mixed by their mean."""

    def init(self, generator=None):
        return {"lr": torch.tensor(0.2, **DOUBLE), "mix": torch.tensor([0.5, 0.25], **DOUBLE)}

    def init_hidden(self, th, p):
        return {"m": torch.zeros_like(p)}

    def init_tensor(self, th, p):
        return {"r": torch.zeros(2, dtype=p.dtype)}

    def init_shared(self, th, params):
        return {"total": torch.zeros((), **DOUBLE)}

    def summary(self, th, p, g, h):
        return torch.stack([g.square().sum(), h["m"].sum()])

    def mix(self, th, summaries, tensors, shared):
        r = 0.5 * tensors["r"] + summaries - summaries.mean(0)
        shared = {"total": shared["total"] + summaries[:, 0].sum()}
        return torch.tanh(r * th["mix"]) + 0.01 * shared["total"], {"r": r}, shared

    def update(self, th, p, g, h, control):
        m = 0.5 * h["m"] + g
        return -th["lr"] * (control[0] * m + control[1] * p), {"m": m}


def hierarchy_by_hand(absent=lambda t: ()):
    rule = Hierarchy()
    th, params = rule.init(), start()
    states = {k: rule.init_hidden(th, p) for k, p in params.items()}
    r = {k: torch.zeros(2, **DOUBLE) for k in params}
    total = torch.zeros((), **DOUBLE)
    for t in range(STEPS):
        grads = {k: g for k, g in gradients(t, absent(t)).items() if g is not None}
        rows = {k: rule.summary(th, params[k], g, states[k]) for k, g in grads.items()}
        mean = torch.stack(list(rows.values())).mean(0)
        total = total + sum(row[0] for row in rows.values())
        for k, g in grads.items():
            r[k] = 0.5 * r[k] + rows[k] - mean
            control = torch.tanh(r[k] * th["mix"]) + 0.01 * total
            delta, states[k] = rule.update(th, params[k], g, states[k], control)
            params[k] = params[k] + delta
    return params, total


@pytest.mark.parametrize("absent", [lambda t: (), alternating], ids=["all", "some None"])
def test_treewise_equals_the_explicit_loop(absent):
    rule = fmeta.treewise(Hierarchy())
    params, hidden = trajectory(rule, rule.init(), absent)
    want, total = hierarchy_by_hand(absent)
    close(params, want)
    torch.testing.assert_close(hidden.shared["total"], total)
    assert hidden.leaves["a"]["tensor"]["r"].shape == (2,)


def test_treewise_rules_may_observe():
    """The same rule with its momentum moved before the tensors talk, and the model's state seen."""

    class Observing(Hierarchy):
        summary = None

        def observe(self, th, p, g, h, shared):
            summary = torch.stack([g.square().sum(), h["m"].sum()])
            return summary, {"m": 0.5 * h["m"] + g + 0 * shared["total"]}

        def update(self, th, p, g, h, control):
            return -th["lr"] * (control[0] * h["m"] + control[1] * p), h

    rule = fmeta.treewise(Observing())
    params, hidden = trajectory(rule, rule.init(), alternating)
    want, total = hierarchy_by_hand(alternating)
    close(params, want)
    torch.testing.assert_close(hidden.shared["total"], total)


def test_treewise_explains_weights_of_another_rule_in_mix():
    rule, params = fmeta.treewise(Hierarchy()), start()
    hidden = rule.init_hidden(rule.init(), params)
    with pytest.raises(ValueError, match="opt_params do not fit this optimizer"):
        rule.step({"lr": torch.ones(())}, params, gradients(0), hidden)


def test_treewise_without_any_gradient_does_nothing():
    rule = fmeta.treewise(Hierarchy())
    params = start()
    hidden = rule.init_hidden(rule.init(), params)
    new, after = rule.step(rule.init(), params, dict.fromkeys(params), hidden)
    assert all(new[k] is params[k] for k in params)
    assert after is hidden


def test_treewise_keeps_the_dtypes_of_all_states():
    rule = fmeta.treewise(Hierarchy())
    p = {"a": torch.ones(2), "b": torch.ones(3, **DOUBLE), "c": torch.ones(2, dtype=torch.bfloat16)}
    before = rule.init_hidden(rule.init(), p)
    new, after = rule.step(rule.init(), p, p, before)
    assert [x.dtype for x in new.values()] == [x.dtype for x in p.values()]
    assert [x.dtype for x in trees.leaves(after)] == [x.dtype for x in trees.leaves(before)]


def test_treewise_mix_gets_the_loss():
    class Needy(Hierarchy):
        needs = frozenset({"loss"})

        def mix(self, th, summaries, tensors, shared, *, loss, extras):
            return loss * torch.ones_like(summaries), tensors, shared

    rule = fmeta.treewise(Needy())
    params, g = start(), gradients(0)
    hidden = rule.init_hidden(rule.init(), params)
    with pytest.raises(ValueError, match="needs the loss"):
        rule.step(rule.init(), params, g, hidden)
    new, _ = rule.step(rule.init(), params, g, hidden, loss=torch.tensor(2.0, **DOUBLE))
    close(new, {k: p - 0.4 * (g[k] + p) for k, p in params.items()})


def test_treewise_init_shared_gets_the_horizon():
    class Needy(Hierarchy):
        needs = frozenset({"num_steps"})

        def init_shared(self, th, params, *, num_steps):
            return {"n": num_steps}

        def mix(self, th, summaries, tensors, shared, **given):
            return summaries, tensors, shared

    rule = fmeta.treewise(Needy())
    assert rule.init_hidden(rule.init(), start(), num_steps=5).shared == {"n": 5}
    with pytest.raises(ValueError, match="needs num_steps"):
        rule.init_hidden(rule.init(), start())


def test_treewise_is_learned_by_grad():
    rule = fmeta.treewise(Hierarchy())
    p = {"a": torch.ones(2, **DOUBLE), "b": torch.ones(2, **DOUBLE), "c": torch.ones((), **DOUBLE)}
    loss = lambda p, b: sum((x - b).square().sum() for x in p.values())

    def meta(mix, checkpoint=None):
        th = {**rule.init(), "mix": mix}
        return fmeta.unroll(
            rule, loss, th, p, torch.linspace(0, 1, 4, **DOUBLE), checkpoint=checkpoint
        ).losses.sum()

    at, v = rule.init()["mix"], torch.tensor([0.3, -0.7], **DOUBLE)
    numeric = (meta(at + 1e-6 * v) - meta(at - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(grad(meta)(at) @ v, numeric, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grad(lambda m: meta(m, "sqrt"))(at), grad(meta)(at))


# --- what all lifts share ------------------------------------------------------------------------


class Keeping:
    """A rule whose `init` hands out its own tensor."""

    def __init__(self):
        self.weights = {"lr": torch.tensor(0.1), "name": 3}

    def init(self, generator):
        return self.weights

    def init_hidden(self, th, p):
        return {}

    def summary(self, th, p, g, h):
        return g.norm()[None]

    def mix(self, th, s, tensors, shared):
        return s, tensors, shared

    def update(self, th, p, g, h, control=None):
        return -th["lr"] * g, h


def of_features(module):
    return fmeta.tensorwise(module, features=lambda p, g, h: torch.stack([g, p], -1))


FROM_PARAMS = {"a": torch.ones(2), "b": torch.ones(3, 2)}
OF_A_TREE = (optimizers.per_parameter_sgd, optimizers.meta_curvature)
KEEPERS = {
    **{
        name: (lambda b=builder: b(FROM_PARAMS) if b in OF_A_TREE else b())
        for name, builder in optimizers.BUILDERS.items()
    },
    "learned adam": lambda: fmeta.learn(optimizers.adam, {"lr": "linear", "betas": "linear"}),
    "coordinatewise module": lambda: fmeta.coordinatewise(nn.Linear(2, 1)),
    "tensorwise module": lambda: of_features(nn.Linear(2, 1)),
    "coordinatewise rule": lambda: fmeta.coordinatewise(Keeping()),
    "tensorwise rule": lambda: fmeta.tensorwise(Keeping()),
    "treewise rule": lambda: fmeta.treewise(Keeping()),
    "in a partition": lambda: fmeta.partition(
        {"a": fmeta.coordinatewise(nn.Linear(2, 1))}, lambda path, x: "a"
    ),
}


@pytest.mark.parametrize("name", KEEPERS)
def test_every_init_gives_tensors_of_its_own(name):
    rule = KEEPERS[name]()
    first = rule.init()
    want = trees.map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, first)
    for x in trees.leaves(first):
        if isinstance(x, torch.Tensor):
            x.add_(1)
    for a, b in zip(trees.leaves(rule.init()), trees.leaves(want), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("shift", torch.tensor([0.5, -0.5]))

    def forward(self, x):
        return self.linear(x + self.shift)


@pytest.mark.parametrize("lifted", [fmeta.coordinatewise, of_features])
def test_buffers_follow_the_parameters_to_their_device(lifted):
    rule = lifted(Shifted())
    on_meta = lambda tree: trees.map(lambda x: x.to("meta"), tree)
    th, params = on_meta(rule.init()), on_meta(FROM_PARAMS)
    new, _ = rule.step(th, params, params, rule.init_hidden(th, params))
    assert all(x.is_meta for x in trees.leaves(new))
    want, _ = rule.step(rule.init(), FROM_PARAMS, FROM_PARAMS, rule.init_hidden({}, FROM_PARAMS))
    net = rule.init()
    weight, bias = net["linear.weight"][0], net["linear.bias"]
    close(
        want,
        trees.map(lambda p: p + p * weight.sum() + (weight[0] - weight[1]) / 2 + bias, FROM_PARAMS),
        1e-6,
    )


@pytest.mark.parametrize("size", [None, 1, 4])
@pytest.mark.parametrize("by", ["update", "step"])
def test_coordinatewise_gets_what_it_needs(by, size):
    class Needy:
        needs = frozenset({"loss", "noise", "num_steps"})
        init = staticmethod(lambda generator: {})
        init_hidden = staticmethod(lambda th, p, *, num_steps: {"n": p.new_tensor(num_steps)})

    def change(th, p, g, h, *, loss, extras):
        return -loss * extras["noise"] * h["n"] * g, h

    def moved(th, p, g, h, **extra):
        return p + change(th, p, g, h, **extra)[0], h

    setattr(Needy, by, staticmethod(change if by == "update" else moved))
    rule = fmeta.coordinatewise(Needy, chunk_size=size)
    assert rule.needs == Needy.needs
    params, g = start(), gradients(0)
    with pytest.raises(ValueError, match=r"needs num_steps.*init_hidden\(.*num_steps=\.\.\.\)"):
        rule.init_hidden({}, params)
    hidden = rule.init_hidden({}, params, num_steps=4)
    with pytest.raises(ValueError, match="needs the loss"):
        rule.step({}, params, g, hidden, extras={"noise": 0.5})
    with pytest.raises(ValueError, match="needs noise"):
        rule.step({}, params, g, hidden, loss=torch.tensor(2.0))
    new, _ = rule.step({}, params, g, hidden, loss=torch.tensor(2.0), extras={"noise": 0.5})
    close(new, {k: p - 4 * g[k] for k, p in params.items()})


def test_a_coordinates_loss_is_differentiated_and_batched():
    class ByLoss:
        needs = frozenset({"loss"})
        init = staticmethod(lambda generator: {"lr": torch.tensor(0.1, **DOUBLE)})
        init_hidden = staticmethod(lambda th, p: {})
        update = staticmethod(lambda th, p, g, h, *, loss, extras: (-th["lr"] * loss * g, h))

    rule = fmeta.coordinatewise(ByLoss)
    loss = lambda p, x: (p["w"] - x).square().sum()
    batches = torch.linspace(-1, 1, 3, **DOUBLE)

    def meta(lr, w):
        return fmeta.unroll(rule, loss, {"lr": lr}, {"w": w}, batches).losses.sum()

    def by_hand(lr, w):
        total = 0.0
        for x in batches:
            value = (w - x).square().sum()
            total, w = total + value, w - lr * value * 2 * (w - x)
        return total

    lr, ws = torch.tensor(0.01, **DOUBLE), torch.tensor([[1.0, 2.0], [0.5, -1.0]], **DOUBLE)
    got = torch.vmap(grad(meta, argnums=(0, 1)), in_dims=(None, 0))(lr, ws)
    want = torch.vmap(grad(by_hand, argnums=(0, 1)), in_dims=(None, 0))(lr, ws)
    torch.testing.assert_close(got, want)


class Failing:
    """Its count is an integer at first, then a floating number; its second update fails."""

    def __init__(self, error):
        self.error = error

    def init(self, generator=None):
        return {"rate": torch.tensor(0.1)}

    def init_hidden(self, th, p):
        return {"n": torch.zeros((), dtype=torch.int64), "m": torch.zeros_like(p)}

    def update(self, th, p, g, h):
        if h["n"].is_floating_point():
            raise self.error
        return -g, {**h, "n": h["n"] + 1.0}


@pytest.mark.parametrize("error", [RuntimeError("mine"), torch.OutOfMemoryError("no memory")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_rule_raises_itself_is_not_blamed_on_its_state(error, dtype):
    """But where the state is that of a parameter of another dtype, it is what is told."""
    rule, p = fmeta.tensorwise(Failing(error)), {"w": torch.ones(3, 4)}
    hidden = rule.update(rule.init(), p, p, rule.init_hidden(rule.init(), p))[1]
    told = type(error) is RuntimeError and dtype is torch.float64
    p = {"w": p["w"].to(dtype)}
    with pytest.raises(
        ValueError if told else type(error), match="holds 'm'" if told else str(error)
    ):
        rule.update(rule.init(), p, p, hidden)
