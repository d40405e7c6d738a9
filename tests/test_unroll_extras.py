"""Extras that depend on the parameters: a function of `unroll`, in every mode."""

import pytest
import torch
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

import fmeta
from fmeta.optimizer import Optimizer
from fmeta.random import fold_in

DOUBLE = {"dtype": torch.float64}
T = 5
PARAMS = {
    "w": torch.randn(3, 2, generator=fold_in(0), **DOUBLE),
    "b": torch.randn(2, generator=fold_in(1), **DOUBLE),
}
BATCHES = {
    "x": torch.randn(T, 4, 3, generator=fold_in(2), **DOUBLE),
    "y": torch.randn(T, 4, 2, generator=fold_in(3), **DOUBLE),
}
TH = torch.tensor([-0.3, 0.2, 0.1], **DOUBLE)
SCALE = torch.tensor(1.5, **DOUBLE)
MODES = {
    "plain": {},
    "sqrt": {"checkpoint": "sqrt"},
    "2 snapshots": {"checkpoint": 2},
    "mixed": {"mixed_mode": True},
    "mixed, sqrt": {"mixed_mode": True, "checkpoint": "sqrt"},
    "kept gradients, sqrt": {"mixed_mode": "keep_gradients", "checkpoint": "sqrt"},
}
modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def loss(p, batch, scale):
    return scale * (torch.tanh(batch["x"] @ p["w"] + p["b"]) - batch["y"]).square().mean()


def seen(p, batch, scale):
    """Activations: what the rule reads."""
    return {"activations": (batch["x"], scale * torch.tanh(batch["x"] @ p["w"] + p["b"]))}


def change(th, p, g, h, *, loss=None, extras=None):
    x, z = extras["activations"]
    m = {"w": 0.5 * h["w"] + x.T @ z / 4, "b": 0.5 * h["b"] + z.mean(0)}
    return {k: th[0] * g[k] + th[1] * m[k] + th[2] * p[k] for k in p}, m


RULE = Optimizer(
    lambda generator=None: TH,
    lambda th, p, **k: tree_map(torch.zeros_like, p),
    change,
    frozenset({"activations"}),
)


def slices():
    return [tree_map(lambda x, t=t: x[t], BATCHES) for t in range(T)]


def by_hand(th, params, scale, order=False):
    hidden, total = RULE.init_hidden(th, params), 0.0
    cut = lambda tree: tree_map(torch.Tensor.detach, tree)
    for batch in slices():
        g, value = torch.func.grad_and_value(loss)(params, batch, scale)
        total = total + value
        read, extras = params, seen(params, batch, scale)
        if order:
            g = cut(g)
        if order == "inputs":
            read, extras = cut(params), cut(extras)
        delta, hidden = RULE.update(th, read, g, hidden, extras=extras)
        params = {k: params[k] + delta[k] for k in params}
    return total + sum(p.square().sum() for p in params.values())


def meta(th, params, scale, **options):
    run = fmeta.unroll(RULE, loss, th, params, BATCHES, loss_args=(scale,), extras=seen, **options)
    return run.losses.sum() + sum(p.square().sum() for p in run.params.values())


def close(got, want, tol=1e-9):
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@modes
def test_they_are_taken_at_the_parameters_of_each_step(options):
    close(meta(TH, PARAMS, SCALE, **options), by_hand(TH, PARAMS, SCALE))


@modes
def test_derivatives_go_through_them(options):
    of = lambda f: grad(f, argnums=(0, 1, 2))(TH, PARAMS, SCALE)
    close(of(lambda *a: meta(*a, **options)), of(by_hand))
    curvature = lambda f: grad(lambda s: grad(f)(TH, PARAMS, s).square().sum())(SCALE)
    close(curvature(lambda *a: meta(*a, **options)), curvature(by_hand))
    leaves = TH.clone().requires_grad_()
    (back,) = torch.autograd.grad(meta(leaves, PARAMS, SCALE, **options), leaves)
    close(back, grad(by_hand)(TH, PARAMS, SCALE))


@modes
def test_vmap_over_what_they_read(options):
    scales = torch.tensor([0.5, 1.0, 2.0], **DOUBLE)
    got = vmap(grad(lambda s: meta(TH, PARAMS, s, **options)))(scales)
    close(got, torch.stack([grad(by_hand, argnums=2)(TH, PARAMS, s) for s in scales]))


@pytest.mark.parametrize("checkpoint", [None, "sqrt"])
@pytest.mark.parametrize("order", [False, "gradients", "inputs"])
def test_first_order_cuts_them_with_the_other_inputs_only(order, checkpoint):
    options = {"first_order": order, "checkpoint": checkpoint}
    close(meta(TH, PARAMS, SCALE, **options), by_hand(TH, PARAMS, SCALE))
    of = lambda f: grad(f, argnums=(0, 1, 2))(TH, PARAMS, SCALE)
    close(of(lambda *a: meta(*a, **options)), of(lambda *a: by_hand(*a, order=order)))


def test_the_three_orders_differ_in_them():
    # A rule that reads nothing but activations: only "inputs" cuts anything.
    th = torch.tensor([0.0, 0.2, 0.0], **DOUBLE)
    slope = lambda order: grad(meta, argnums=1)(th, PARAMS, SCALE, first_order=order)["w"]
    close(slope("gradients"), slope(False))
    assert (slope("inputs") - slope(False)).abs().max() > 1e-3


def test_inner_step_takes_them_too():
    step = fmeta.inner_step(RULE, loss, loss_args=(SCALE,))
    state = fmeta.InnerState(PARAMS, RULE.init_hidden(TH, PARAMS))
    losses = []
    for batch in slices():
        state, metrics = step(TH, state, batch, extras=seen)
        losses.append(metrics["loss"])
    run = fmeta.unroll(RULE, loss, TH, PARAMS, BATCHES, loss_args=(SCALE,), extras=seen)
    close((torch.stack(losses), state.params), (run.losses, run.params), 0)


def test_with_a_model_state_they_see_the_state_before_the_step():
    told = []

    def loss_fn(p, batch, state, scale):
        return loss(p, batch, scale), state + 1

    def extras(p, batch, state, scale):
        told.append(float(state))
        return seen(p, batch, scale)

    run = fmeta.unroll(
        RULE, loss_fn, TH, PARAMS, BATCHES,
        loss_args=(SCALE,), extras=extras, model_state=torch.zeros(()),
    )  # fmt: skip
    assert told == [0.0, 1.0, 2.0, 3.0, 4.0]
    plain = fmeta.unroll(RULE, loss, TH, PARAMS, BATCHES, loss_args=(SCALE,), extras=seen)
    close(run.params, plain.params, 0)


@pytest.mark.parametrize("options", [m for m in MODES.values() if "checkpoint" in m], ids=str)
def test_what_they_close_over_is_refused_where_it_would_be_a_constant(options):
    def meta(scale):
        return fmeta.unroll(
            RULE, loss, TH, PARAMS, BATCHES, loss_args=(torch.ones((), **DOUBLE),),
            extras=lambda p, batch, _: seen(p, batch, scale), **options,
        ).losses.sum()  # fmt: skip

    with pytest.raises(ValueError, match=r"`loss_args` .what the loss or a function of `extras`"):
        grad(meta)(SCALE)


@pytest.mark.parametrize("options", [{}, {"mixed_mode": True}], ids=str)
def test_what_they_close_over_is_differentiated_where_nothing_is_recomputed(options):
    one = torch.ones((), **DOUBLE)

    def closed(scale):
        return fmeta.unroll(
            RULE, loss, TH, PARAMS, BATCHES, loss_args=(one,),
            extras=lambda p, batch, _: seen(p, batch, scale), **options,
        ).losses.sum()  # fmt: skip

    def passed(scale):
        return fmeta.unroll(
            RULE, lambda p, b, s: loss(p, b, one), TH, PARAMS, BATCHES, loss_args=(scale,),
            extras=seen,
        ).losses.sum()  # fmt: skip

    close(grad(closed)(SCALE), grad(passed)(SCALE))


def test_activations_of_a_module_are_such_extras():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    apply, params, buffers = fmeta.functionalize(net)
    record = fmeta.functional.activations(net)

    def hebb(th, p, g, h, *, loss=None, extras=None):
        layers = extras["activations"]
        outer = {f"{name}.weight": z.T @ x / len(x) for name, (x, z) in layers.items()}
        return {k: -0.1 * outer[k] if k in outer else None for k in p}, h

    rule = Optimizer(lambda generator=None: (), lambda th, p, **k: (), hebb,
                     frozenset({"activations"}), reads_grads=False)  # fmt: skip
    batches = (BATCHES["x"].float(), BATCHES["y"].float())
    run = fmeta.unroll(
        rule, lambda p, b: (apply(p, buffers, b[0]) - b[1]).square().mean(), (), params, batches,
        extras=lambda p, b: {"activations": record(p, buffers, b[0])},
    )  # fmt: skip
    want = params
    for x in batches[0]:
        h = torch.tanh(x @ want["0.weight"].T + want["0.bias"])
        z = x @ want["0.weight"].T + want["0.bias"], h @ want["2.weight"].T + want["2.bias"]
        want = {
            **want,
            "0.weight": want["0.weight"] - 0.1 * z[0].T @ x / 4,
            "2.weight": want["2.weight"] - 0.1 * z[1].T @ h / 4,
        }
    close(run.params, want, 1e-5)


# --- rules that read no gradients ----------------------------------------------------------------


def ignoring(reads_grads):
    return RULE._replace(
        update=lambda th, p, g, h, **extra: change(
            th * torch.tensor([0.0, 1, 1]), p, g, h, **extra
        ),
        reads_grads=reads_grads,
    )


@modes
def test_without_the_backward_pass_all_is_the_same(options):
    def outcome(reads_grads):
        def total(th, p, s):
            run = fmeta.unroll(
                ignoring(reads_grads), loss, th, p, BATCHES, loss_args=(s,), extras=seen, **options
            )
            return run.losses.sum() + run.params["w"].square().sum(), tuple(run[:3])

        return grad(total, argnums=(0, 1, 2), has_aux=True)(TH, PARAMS, SCALE)

    close(outcome(False), outcome(True))
    many = torch.stack([TH, 2 * TH])
    losses = lambda th: (
        fmeta.unroll(
            ignoring(False), loss, th, PARAMS, BATCHES, loss_args=(SCALE,), extras=seen, **options
        ).losses
    )
    close(vmap(losses)(many), torch.stack([losses(th) for th in many]))


def test_the_backward_pass_is_not_run():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            raise AssertionError("a gradient was taken")

    fragile = lambda p, batch, scale: loss(
        {"w": NoBackward.apply(p["w"]), "b": p["b"]}, batch, scale
    )
    options = {"loss_args": (SCALE,), "extras": seen}
    run = fmeta.unroll(ignoring(False), fragile, TH, PARAMS, BATCHES, **options)
    close(run.losses, fmeta.unroll(ignoring(False), loss, TH, PARAMS, BATCHES, **options).losses)
    with pytest.raises(AssertionError, match="a gradient was taken"):
        fmeta.unroll(ignoring(True), fragile, TH, PARAMS, BATCHES, **options)


def test_a_loss_that_is_no_scalar_is_refused_as_ever():
    with pytest.raises(ValueError, match="must return a floating scalar"):
        fmeta.unroll(
            ignoring(False), lambda p, b, s: p["w"], TH, PARAMS, BATCHES,
            loss_args=(SCALE,), extras=seen,
        )  # fmt: skip


# --- errors --------------------------------------------------------------------------------------

ERRORS = {
    "another name": (
        lambda p, b, s: {"activity": 1},
        ValueError,
        r"needs activations, but the function of extras gives activity: .*\{'activations': ",
    ),
    "no dict": (lambda p, b, s: p["w"], TypeError, "must give a dict .*, got a Tensor"),
    "no function": (3.0, TypeError, "extras must be a dict .* got a float; or a function"),
    "nothing": (None, ValueError, r"needs activations: pass extras=.*extras\(params, batch"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_missing_is_named(case):
    extras, kind, words = ERRORS[case]
    with pytest.raises(kind, match=words):
        fmeta.unroll(RULE, loss, TH, PARAMS, BATCHES, loss_args=(SCALE,), extras=extras)
