"""Inner training as a pure function: by hand, in every mode, at every depth."""

import pytest
import torch
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import fmeta
from fmeta import _autodiff, optimizers
from fmeta.optimizer import Optimizer
from fmeta.random import fold_in

DOUBLE = {"dtype": torch.float64}
T = 5
PARAMS = {
    "w": torch.randn(3, 2, generator=fold_in(0), **DOUBLE),
    "b": torch.randn(2, generator=fold_in(1), **DOUBLE),
}
X = torch.randn(T, 4, 3, generator=fold_in(2), **DOUBLE)
Y = torch.randn(T, 4, 2, generator=fold_in(3), **DOUBLE)
BATCHES = {"x": X, "y": Y}
MODES = {
    "plain": {},
    "sqrt": {"checkpoint": "sqrt"},
    "2 snapshots": {"checkpoint": 2},
    "mixed": {"mixed_mode": True},
    "mixed, sqrt": {"mixed_mode": True, "checkpoint": "sqrt"},
    "kept gradients, sqrt": {"mixed_mode": "keep_gradients", "checkpoint": "sqrt"},
    "kept gradients, 2 snapshots": {"mixed_mode": "keep_gradients", "checkpoint": 2},
}
modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def loss(p, batch):
    return (torch.tanh(batch["x"] @ p["w"] + p["b"]) - batch["y"]).square().mean()


def slices(tree=BATCHES):
    return [tree_map(lambda x, t=t: x[t], tree) for t in range(T)]


def rule():
    """Adam with a learned rate and betas: a state, and a rule that reads only the gradient."""
    return fmeta.learn(optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=0.1)


def theta():
    return tree_map(lambda x: x.double(), rule().init())


def close(got, want, tol=1e-9):
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def by_hand(opt, th, params, batches=None, loss=loss):
    """Losses and end of training with the optimizer's own step, and nothing else of fmeta."""
    hidden = opt.init_hidden(th, params, num_steps=T)
    losses = []
    for batch in slices() if batches is None else batches:
        g, l = torch.func.grad_and_value(loss)(params, batch)
        losses.append(l)
        params, hidden = opt.step(th, params, g, hidden, loss=l)
    return torch.stack(losses), params, hidden


# --- values -------------------------------------------------------------------------------------


@modes
def test_values_are_those_of_the_loop(options):
    run = fmeta.unroll(rule(), loss, theta(), PARAMS, BATCHES, **options)
    losses, params, hidden = by_hand(rule(), theta(), PARAMS)
    close((run.losses, run.params, run.hidden), (losses, params, hidden))
    assert run.model_state == ()
    assert run.eval_losses == ()


@modes
def test_a_whole_run_can_leave_vmap(options):
    stacked = {k: torch.stack([p, 2 * p]) for k, p in PARAMS.items()}
    runs = vmap(lambda p: fmeta.unroll(rule(), loss, theta(), p, BATCHES, **options))(stacked)
    assert isinstance(runs, fmeta.Run)
    for i in range(2):
        one = fmeta.unroll(rule(), loss, theta(), {k: p[i] for k, p in stacked.items()}, BATCHES)
        close(tree_map(lambda x, i=i: x[i], tuple(runs)), tuple(one))


def test_inputs_are_not_changed():
    before = tree_map(torch.clone, (theta(), PARAMS, BATCHES))
    th = theta()
    fmeta.unroll(rule(), loss, th, PARAMS, BATCHES, checkpoint="sqrt")
    assert all(
        torch.equal(a, b)
        for a, b in zip(tree_leaves((th, PARAMS, BATCHES)), tree_leaves(before), strict=True)
    )


def test_inner_step_is_the_body_of_unroll():
    step = fmeta.inner_step(rule(), loss)
    state = fmeta.InnerState(PARAMS, rule().init_hidden(theta(), PARAMS))
    state, metrics = fmeta.scan(lambda s, b: step(theta(), s, b), state, BATCHES)
    run = fmeta.unroll(rule(), loss, theta(), PARAMS, BATCHES)
    assert torch.equal(metrics["loss"], run.losses)
    close((state.params, state.hidden), (run.params, run.hidden), 0)


def test_inner_step_takes_loss_args_at_the_start_or_at_each_call():
    scaled = lambda p, b, s: s * loss(p, b)
    state = fmeta.InnerState(PARAMS, optimizers.sgd(0.1).init_hidden({}, PARAMS))
    two, three = torch.tensor(2.0, **DOUBLE), torch.tensor(3.0, **DOUBLE)
    step = fmeta.inner_step(optimizers.sgd(0.1), scaled, loss_args=(two,))
    default = step({}, state, slices()[0])[1]["loss"]
    given = step({}, state, slices()[0], loss_args=(three,))[1]["loss"]
    close(3 * default, 2 * given)


def test_going_on_from_a_hidden_state_is_exact():
    whole = fmeta.unroll(rule(), loss, theta(), PARAMS, BATCHES)
    first = fmeta.unroll(rule(), loss, theta(), PARAMS, tree_map(lambda x: x[:2], BATCHES))
    rest = fmeta.unroll(
        rule(),
        loss,
        theta(),
        first.params,
        tree_map(lambda x: x[2:], BATCHES),
        hidden=first.hidden,
    )
    assert torch.equal(torch.cat([first.losses, rest.losses]), whole.losses)
    close((rest.params, rest.hidden), (whole.params, whole.hidden), 0)


@pytest.mark.parametrize("given", [None, 9, torch.tensor(9)], ids=["default", "int", "tensor"])
def test_the_horizon_reaches_init_hidden(given):
    opt = Optimizer(
        lambda generator=None: {},
        lambda th, p, *, num_steps=None: {"n": torch.as_tensor(num_steps)},
        lambda th, p, g, h, **extra: (g, h),
        frozenset({"num_steps"}),
    )
    run = fmeta.unroll(opt, loss, {}, PARAMS, BATCHES, num_steps=given)
    assert run.hidden["n"] == (T if given is None else 9)


@modes
def test_extras_are_sliced_per_step_and_reach_the_rule(options):
    def update(th, p, g, h, *, loss=None, extras=None):
        return {k: -0.1 * g[k] + extras["noise"]["by"] for k in g}, h

    opt = Optimizer(lambda generator=None: {}, lambda th, p, **k: {}, update, frozenset({"noise"}))
    noise = torch.randn(T, generator=fold_in(4), **DOUBLE)

    def meta(noise):
        return fmeta.unroll(
            opt, loss, {}, PARAMS, BATCHES, extras={"noise": {"by": noise}}, **options
        ).losses.sum()

    def reference(noise):
        p, total = PARAMS, 0.0
        for batch, n in zip(slices(), noise, strict=True):
            total = total + loss(p, batch)
            g = grad(loss)(p, batch)
            p = {k: p[k] - 0.1 * g[k] + n for k in p}
        return total

    close(meta(noise), reference(noise))
    close(grad(meta)(noise), grad(reference)(noise))


@modes
def test_eval_losses_come_after_each_update(options):
    run = fmeta.unroll(
        rule(), loss, theta(), PARAMS, BATCHES, eval_batches={"x": -X, "y": Y}, **options
    )
    for t in range(T):
        head = tree_map(lambda x, t=t: x[: t + 1], BATCHES)
        end = fmeta.unroll(rule(), loss, theta(), PARAMS, head).params
        close(run.eval_losses[t], loss(end, {"x": -X[t], "y": Y[t]}))
    assert run.eval_losses.shape == (T,)


def test_an_eval_loss_of_its_own_gets_the_loss_args_too():
    run = fmeta.unroll(
        optimizers.sgd(0.1),
        lambda p, b, k: loss(p, b),
        {},
        PARAMS,
        BATCHES,
        loss_args=(torch.tensor(3.0, **DOUBLE),),
        eval_batches=torch.arange(T),
        eval_loss_fn=lambda p, b, k: k * b + 0 * p["b"].sum(),
    )
    close(run.eval_losses, 3.0 * torch.arange(T, **DOUBLE))


def test_eval_params_of_the_rule_are_what_is_evaluated():
    average = optimizers.sgd(0.1)._replace(
        eval_params=lambda th, p, h: {k: 0 * v for k, v in p.items()}
    )
    run = fmeta.unroll(average, loss, {}, PARAMS, BATCHES, eval_batches=BATCHES)
    close(run.eval_losses, Y.square().mean((1, 2)))


@modes
def test_one_batch_may_be_expanded(options):
    one = slices()[0]
    repeated = tree_map(lambda x: x.expand(T, *x.shape), one)
    run = fmeta.unroll(rule(), loss, theta(), PARAMS, repeated, **options)
    close(run.losses, by_hand(rule(), theta(), PARAMS, [one] * T)[0])


# --- model state --------------------------------------------------------------------------------


def stateful(p, batch, s, scale=1.0):
    value = loss(p, batch)
    return scale * s["ema"] * value, {"ema": 0.9 * s["ema"] + 0.1 * value, "n": s["n"] + 1}


STATE = {"ema": torch.tensor(0.7, **DOUBLE), "n": torch.tensor(0)}


def stateful_by_hand(lr, params, ema):
    total = 0.0
    for batch in slices():
        g, value = torch.func.grad_and_value(loss)(params, batch)
        total = total + ema * value
        params = {k: params[k] - lr * ema * g[k] for k in params}
        ema = 0.9 * ema + 0.1 * value
    return total, ema


@modes
def test_model_state_is_carried_and_differentiated(options):
    def meta(params, ema, opt_params):
        opt = fmeta.learn(optimizers.sgd, {"lr": "linear"})
        start = {**STATE, "ema": ema}
        run = fmeta.unroll(opt, stateful, opt_params, params, BATCHES, model_state=start, **options)
        return run.losses.sum() + run.model_state["ema"], run.model_state["n"]

    want = lambda params, ema, th: sum(stateful_by_hand(th["lr"], params, ema))
    at = PARAMS, STATE["ema"], {"lr": torch.tensor(0.3, **DOUBLE)}
    got, n = grad(meta, argnums=(0, 1, 2), has_aux=True)(*at)
    close(got, grad(want, argnums=(0, 1, 2))(*at))
    assert n == T


def test_model_state_is_continued_exactly_and_shown_to_the_evaluation():
    opt = optimizers.sgd(0.3)
    half = lambda a, b: tree_map(lambda x: x[a:b], BATCHES)
    whole = fmeta.unroll(
        opt, stateful, {}, PARAMS, BATCHES, model_state=STATE, eval_batches=BATCHES
    )
    a = fmeta.unroll(opt, stateful, {}, PARAMS, half(0, 3), model_state=STATE)
    b = fmeta.unroll(
        opt,
        stateful,
        {},
        a.params,
        half(3, T),
        hidden=a.hidden,
        model_state=a.model_state,
        eval_batches=half(3, T),
    )
    assert torch.equal(b.model_state["ema"], whole.model_state["ema"])
    close(b.eval_losses, whole.eval_losses[3:])
    last = b.model_state["ema"] * loss(b.params, slices()[-1])
    close(b.eval_losses[-1], last)  # its own new state is thrown away


# --- first order --------------------------------------------------------------------------------


W = torch.tensor([-0.3, 0.05, -0.1, 0.2], **DOUBLE)


def reading_all(w):
    """A rule that reads gradient, parameter, loss and a state of its own."""

    def update(th, p, g, h, *, loss=None, extras=None):
        m = {k: 0.5 * h["m"][k] + th[2] * g[k] for k in p}
        return {k: th[0] * g[k] + th[1] * p[k] + m[k] + th[3] * loss for k in p}, {"m": m}

    return Optimizer(
        lambda generator=None: w,
        lambda th, p, **k: {"m": tree_map(torch.zeros_like, p)},
        update,
        frozenset({"loss"}),
    )


def cut_by_hand(w, params, order):
    """The definition: what enters the rule is cut; params + delta and hidden are not."""
    opt, total = reading_all(w), 0.0
    hidden = opt.init_hidden(w, params)
    cut = lambda tree: tree_map(torch.Tensor.detach, tree)
    for batch in slices():
        g, value = torch.func.grad_and_value(loss)(params, batch)
        total = total + value
        read, read_loss = params, value
        if order:
            g = cut(g)
        if order == "inputs":
            read, read_loss = cut(params), value.detach()
        delta, hidden = opt.update(w, read, g, hidden, loss=read_loss)
        params = {k: params[k] + delta[k] for k in params}
    return total


@pytest.mark.parametrize("checkpoint", [None, "sqrt", 2])
@pytest.mark.parametrize("order", [False, "gradients", "inputs"])
def test_first_order_is_as_defined(order, checkpoint):
    meta = lambda w, p: fmeta.unroll(
        reading_all(w), loss, w, p, BATCHES, first_order=order, checkpoint=checkpoint
    ).losses.sum()
    close(meta(W, PARAMS), cut_by_hand(W, PARAMS, False))  # values are equal in all three
    want = grad(cut_by_hand, argnums=(0, 1))(W, PARAMS, order)
    close(grad(meta, argnums=(0, 1))(W, PARAMS), want)
    w = W.clone().requires_grad_()
    close(torch.autograd.grad(meta(w, PARAMS), w)[0], want[0])


def test_true_means_gradients_and_all_three_differ():
    slope = lambda order: grad(
        lambda w: fmeta.unroll(
            reading_all(w), loss, w, PARAMS, BATCHES, first_order=order
        ).losses.sum()
    )(W)
    close(slope(True), slope("gradients"), 0)
    assert (slope(False) - slope(True)).abs().max() > 1e-3
    assert (slope(True) - slope("inputs")).abs().max() > 1e-3


def test_hidden_is_never_detached():
    # One step with momentum: the second delta depends on th through the first one's momentum too.
    opt = fmeta.learn(optimizers.sgd, {"lr": "linear", "momentum": "linear"}, momentum=0.5)
    th = {"lr": torch.tensor(0.1, **DOUBLE), "momentum": torch.tensor(0.5, **DOUBLE)}
    meta = lambda th: fmeta.unroll(
        opt,
        lambda p, b: p.square().sum() / 2,
        th,
        torch.ones((), **DOUBLE),
        torch.zeros(3),
        first_order="inputs",
    ).hidden.leaves["m"]
    # m3 = g3 + mu (g2 + mu g1) with constants g: d/dmu = g2 + 2 mu g1
    g1, g2 = 1.0, 0.9
    close(grad(meta)(th)["momentum"], torch.tensor(g2 + 2 * 0.5 * g1, **DOUBLE))


def test_first_order_sgd_is_the_gradient_at_the_end():
    last = lambda p: fmeta.unroll(
        optimizers.sgd(0.1), loss, {}, p, BATCHES, first_order=True
    ).losses[-1]
    head = tree_map(lambda x: x[:-1], BATCHES)
    end = fmeta.unroll(optimizers.sgd(0.1), loss, {}, PARAMS, head).params
    close(grad(last)(PARAMS), grad(loss)(end, slices()[-1]))


# --- what is learned ----------------------------------------------------------------------------


def meta_of(options):
    return lambda th, p: fmeta.unroll(rule(), loss, th, p, BATCHES, **options).losses.sum()


@modes
def test_opt_params_initialisation_or_both_are_learned_by_grad(options):
    meta = meta_of(options)
    want = grad(lambda th, p: by_hand(rule(), th, p)[0].sum(), argnums=(0, 1))(theta(), PARAMS)
    close(grad(meta, argnums=(0, 1))(theta(), PARAMS), want)
    close(grad(meta)(theta(), PARAMS), want[0])
    close(grad(meta, argnums=1)(theta(), PARAMS), want[1])


@modes
def test_backward_equals_func_grad(options):
    flat, spec = tree_flatten((theta(), PARAMS))
    leaves = [x.clone().requires_grad_() for x in flat]
    meta_of(options)(*tree_unflatten(leaves, spec)).backward()
    close([x.grad for x in leaves], grad(meta_of(options), argnums=(0, 1))(theta(), PARAMS))


@modes
def test_meta_gradient_equals_finite_differences(options):
    flat, spec = tree_flatten((theta(), PARAMS))
    meta = lambda *leaves: meta_of(options)(*tree_unflatten(list(leaves), spec))
    slopes = grad(meta, argnums=tuple(range(len(flat))))(*flat)
    for i, x in enumerate(flat):
        v = torch.randn(x.shape, generator=fold_in(5, i), **DOUBLE)
        moved = lambda e, i=i, x=x, v=v: meta(*flat[:i], x + e * v, *flat[i + 1 :])
        numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
        torch.testing.assert_close((slopes[i] * v).sum(), numeric, rtol=1e-6, atol=1e-8)


@modes
def test_the_meta_hessian_is_right_too(options):
    lr = torch.tensor(0.3, **DOUBLE)
    opt = fmeta.learn(optimizers.sgd, {"lr": "linear"})
    meta = lambda lr: fmeta.unroll(opt, loss, {"lr": lr}, PARAMS, BATCHES, **options).losses.sum()
    numeric = (grad(meta)(lr + 1e-6) - grad(meta)(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(grad(meta))(lr), numeric, rtol=1e-6, atol=1e-8)


@modes
def test_batches_of_integers_are_no_obstacle(options):
    table = {"e": torch.randn(6, 2, generator=fold_in(6), **DOUBLE)}
    look = lambda p, i: p["e"][i].square().sum()
    idx = torch.tensor([[0, 1], [2, 2], [5, 0]])
    meta = lambda p: fmeta.unroll(optimizers.sgd(0.1), look, {}, p, idx, **options).losses.sum()
    numeric = torch.autograd.functional.jacobian(lambda e: meta({"e": e}), table["e"])
    close(grad(meta)(table)["e"], numeric)


# --- the parameters are also an argument of the loss --------------------------------------------


def proximal(p, batch, anchor):
    # The product has a slope in the anchor from the first step on, where p is the anchor.
    pull = sum(((p[k] - anchor[k]).square() + 0.3 * p[k] * anchor[k]).sum() for k in p)
    return loss(p, batch) + 0.7 * pull


def proximal_by_hand(params):
    p, total = params, 0.0
    for batch in slices():
        g, l = torch.func.grad_and_value(lambda q, b=batch: proximal(q, b, params))(p)
        total, p = total + l, {k: p[k] - 0.1 * g[k] for k in p}
    return total


def proximal_meta(options):
    return lambda params: fmeta.unroll(
        optimizers.sgd(0.1), proximal, {}, params, BATCHES, loss_args=(params,), **options
    ).losses.sum()


DEPTHS = {
    "no_grad": lambda f: torch.no_grad()(f)(PARAMS),
    "value": lambda f: f(PARAMS),
    "func.grad": lambda f: grad(f)(PARAMS),
    "autograd": lambda f: torch.autograd.grad(
        f(dict(zip(PARAMS, leaves := fresh(), strict=True))), leaves
    ),
    "no_grad func.grad": lambda f: torch.no_grad()(grad(f))(PARAMS),
    "func.grad of autograd leaves": lambda f: tree_map(
        torch.Tensor.detach, grad(f)(dict(zip(PARAMS, fresh(), strict=True)))
    ),
    "grad of grad": lambda f: grad(lambda p: sum(x.square().sum() for x in grad(f)(p).values()))(
        PARAMS
    ),
    "vmap of grad": lambda f: vmap(grad(f))({k: torch.stack([p, -p]) for k, p in PARAMS.items()}),
}


def fresh():
    return [p.clone().requires_grad_() for p in PARAMS.values()]


@modes
@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters_that_are_loss_args_too(depth, options):
    close(
        tree_leaves(DEPTHS[depth](proximal_meta(options))),
        tree_leaves(DEPTHS[depth](proximal_by_hand)),
    )


# --- the gradient below it ----------------------------------------------------------------------


def tracked(p, s):
    value = loss(p, slices()[0]) * s
    return value, {"twice": 2 * value, "n": torch.tensor(3)}


def value_and_all(p, s):
    grads, (value, aux) = _autodiff.grad_and_value(tracked, p, s)
    return grads, value, aux


S = torch.tensor(1.5, **DOUBLE)


def reference_gradient(p, s):
    grads, (value, aux) = torch.func.grad_and_value(tracked, has_aux=True)(p, s)
    return grads, value, aux


@pytest.mark.parametrize("leaf", ["params", "argument", "none"])
@pytest.mark.parametrize("recording", [True, False])
def test_grad_and_value_is_the_same_in_all_its_paths(leaf, recording):
    p = {k: x.clone().requires_grad_(leaf == "params") for k, x in PARAMS.items()}
    s = S.clone().requires_grad_(leaf == "argument")
    with torch.set_grad_enabled(recording):
        got = value_and_all(p, s)
    close(tree_map(torch.Tensor.detach, got), reference_gradient(PARAMS, S))
    recorded = recording and leaf != "none"
    assert all(x.requires_grad == recorded for x in (*got[0].values(), got[1], got[2]["twice"]))


def test_grad_and_value_is_differentiated_again_in_all_its_paths():
    size = lambda fn: lambda p, s: sum(x.square().sum() for x in fn(p, s)[0].values())
    want = grad(size(reference_gradient), argnums=(0, 1))(PARAMS, S)
    close(grad(size(value_and_all), argnums=(0, 1))(PARAMS, S), want)
    leaves = [*fresh(), S.clone().requires_grad_()]
    value = size(value_and_all)(dict(zip(PARAMS, leaves[:-1], strict=True)), leaves[-1])
    first = torch.autograd.grad(value, leaves)
    close(first[:-1], list(want[0].values()))
    close(first[-1], want[1])


def test_a_closed_over_leaf_that_requires_grad_is_seen():
    k = torch.tensor(2.0, **DOUBLE, requires_grad=True)
    grads, (value, _) = _autodiff.grad_and_value(lambda p: (k * p.square(), ()), S)
    assert torch.autograd.grad(grads, k)[0] == 2 * S
    assert torch.autograd.grad(value, k)[0] == S**2


def test_a_loss_that_reads_no_parameter_has_zero_gradients():
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            grads, _ = _autodiff.grad_and_value(lambda p: (S * 1, ()), PARAMS)
        assert all((g == 0).all() for g in grads.values())


def test_no_graph_is_kept_under_no_grad():
    with torch.no_grad():
        run = fmeta.unroll(rule(), loss, theta(), dict(zip(PARAMS, fresh(), strict=True)), BATCHES)
    assert not any(x.requires_grad for x in tree_leaves(tuple(run)))
