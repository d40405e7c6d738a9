"""Every law catches an optimizer that breaks it, and says where; what is sound it leaves alone."""

import re
from typing import NamedTuple

import pytest
import torch

from fmeta import trees
from fmeta.optimizer import Hidden, Optimizer, apply_updates
from fmeta.testing import LAWS, built_in_trees, check_optimizer

SMALL = built_in_trees()["small"]
TRACERS = {"make_fx_traces", "runs_on_meta", "vmap_equals_loop", "checkpoint_changes_nothing"}


def rates(generator=None):
    return {"lr": torch.tensor(0.1), "decay": torch.tensor(0.01)}


def momentum(th, p, g, m):
    m = 0.5 * m + g
    return -(th["lr"] * m + th["decay"] * p), m


def zeros(p):
    return torch.zeros_like(p, dtype=trees.compute_dtype(p))


def build(change=momentum, *, init=rates, absent=lambda p: None, needs=(), horizon=None):
    """A sound hand-written optimizer (gradient descent with momentum), but for what is given."""

    def init_hidden(th, params, *, num_steps=None):
        if horizon:
            horizon(num_steps)
        return Hidden(trees.map(lambda p: {"m": zeros(p)}, params), {})

    def update(th, params, grads, hidden, *, loss=None, extras=None):
        given = {"loss": loss, "extras": extras} if needs is None else {}
        flat, spec = trees.flatten(params)
        found = trees.match(params, grads, "the gradient")
        states = trees.flatten_up_to(spec, hidden.leaves, params, "hidden")
        rows = []
        for p, g, h in zip(flat, found, states, strict=True):
            g = absent(p) if g is None else g
            if g is None:
                rows.append((None, h))
                continue
            dtype = trees.compute_dtype(p)
            delta, m = change(trees.cast(th, dtype), p.to(dtype), g.to(dtype), h["m"], **given)
            rows.append((delta, {"m": m}))
        return trees.unflatten(spec, [d for d, _ in rows]), Hidden(
            trees.unflatten(spec, [h for _, h in rows]), hidden.shared
        )

    return Optimizer(init, init_hidden, update, frozenset(needs or ()))


def in_place(th, p, g, m):
    g.round_()
    return momentum(th, p, g, m)


def double_hidden(th, p, g, m):
    delta, m = momentum(th, p, g, m)
    return delta.to(p.dtype), m.double()


def narrow_delta(th, p, g, m):
    delta, m = momentum(th, p, g, m)
    return delta.bfloat16() if p.dtype == torch.float32 else delta, m


class RoundsTwice(Optimizer):
    """Casts the delta before it adds it."""

    __slots__ = ()

    def step(self, th, params, grads, hidden, *, loss=None, extras=None):
        delta, hidden = self.update(th, params, grads, hidden, loss=loss, extras=extras)
        small = trees.map(lambda p, d: None if d is None else d.to(p.dtype), params, delta)
        return apply_updates(params, small), hidden


def loss_scaled(th, p, g, m, loss, extras):
    return momentum(th, p, loss.to(g.dtype) * g, m)


def global_noise(generator=None):
    return {"lr": torch.rand(()), "decay": torch.tensor(0.01)}


def by_position():
    good = build()

    def update(th, params, grads, hidden, **given):
        aligned = dict(zip(params, grads.values(), strict=True))
        return good.update(th, params, aligned, hidden, **given)

    return good._replace(update=update)


class Unbatched(torch.autograd.Function):
    """The identity, without a rule for vmap."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.clone()


def looks_at_values(th, p, g, m):
    if (g.abs().sum() > 1e9).item():
        g = g / 2
    return momentum(th, p, g, m)


def position(th, p, g, m):
    return momentum(th, p, g * torch.arange(g.numel(), device=g.device).view(g.shape), m)


def row_normed(th, p, g, m):
    size = (g.square().mean(-1, keepdim=True) + 1e-8).sqrt() if g.ndim else 1.0
    return momentum(th, p, g / size, m)


def bare_root(th, p, g, m):
    m = 0.5 * m + g * g
    return -th["lr"] * g / (m.sqrt() + 1e-3), m


def cut_rate(th, p, g, m):
    return momentum({**th, "lr": th["lr"].detach()}, p, g, m)


def cut_momentum(th, p, g, m):
    return momentum(th, p, g, m.detach())


def asks_for_grad(th, p, g, m):
    return momentum(th, p, g * 1.5 if g.requires_grad else g, m)


def asks_for_grad_mode(th, p, g, m):
    return momentum(th, p, g if torch.is_grad_enabled() else g * 1.5, m)


def on_cpu(th, p, g, m):
    return momentum(th, p, g * torch.ones(g.shape, dtype=g.dtype), m)


def counting():
    calls = {"n": 0}

    def change(th, p, g, m):
        calls["n"] += 1
        return momentum(th, p, g, m)

    return build(change)


class Broken(NamedTuple):
    """An optimizer that breaks a law.

    Attributes:
        law: what it breaks.
        optimizer: it.
        says: pattern of the message.
        also: further laws that cannot hold either.
    """

    law: str
    optimizer: Optimizer
    says: str
    also: frozenset = frozenset()


BROKEN = {
    "edits the gradient": Broken(
        "inputs_unchanged", build(in_place), r"update changed its argument grads\['b'\] in place"
    ),
    "hidden state in float64": Broken(
        "kinds_kept",
        build(double_hidden),
        r"hidden.leaves\['b'\]\['m'\] became float64 in step 1 .*, was float32: cast to",
    ),
    "delta in bfloat16": Broken(
        "kinds_kept", build(narrow_delta), r"delta\['b'\] is bfloat16 in .*, must be float32"
    ),
    "rounds twice": Broken(
        "delta_added_once", RoundsTwice(*build()), r"params\['\w+'\] after step, beside param"
    ),
    "None is zero": Broken(
        "none_gradients_skip",
        build(absent=zeros),
        r"delta at params\['b'\] is not None with a None gradient",
    ),
    "needs the loss and does not say so": Broken(
        "needs_enforced", build(loss_scaled, needs=None), r"with nothing but its needs \(none\)"
    ),
    "does not need the horizon it needs": Broken(
        "needs_enforced", build(needs={"num_steps"}), "init_hidden ran without num_steps"
    ),
    "global noise": Broken(
        "deterministic", build(init=global_noise), "init used torch's global generator"
    ),
    "dicts by position": Broken(
        "key_order_irrelevant", by_position(), r"\['\w+'\] .*grads in reversed key order"
    ),
    "no rule for vmap": Broken(
        "vmap_equals_loop",
        build(lambda th, p, g, m: momentum(th, p, Unbatched.apply(g), m)),
        "raised RuntimeError: .*vmap",
        frozenset({"checkpoint_changes_nothing"}),
    ),
    "coordinates by position": Broken(
        "permutation_equivariant",
        build(position),
        r"params\['b'\] after step 1 with coordinates permuted.*: at flat index",
    ),
    "rows": Broken(
        "permutation_equivariant",
        build(row_normed),
        r"params\['w'\] after step 1 with coordinates permuted",
    ),
    "bare root": Broken(
        "zero_gradients_finite",
        build(bare_root),
        r"the meta-gradient of opt_params\['lr'\] is not finite with gradients of zero",
    ),
    "detached rate": Broken(
        "meta_gradients_exact",
        build(cut_rate),
        r"the meta-gradient of opt_params\['lr'\] along a random direction is 0, but",
    ),
    "detached momentum": Broken(
        "meta_gradients_exact", build(cut_momentum), "the meta-gradient of .* differences give"
    ),
    "asks whether a gradient is wanted": Broken(
        "first_order_values_equal",
        build(asks_for_grad),
        r'with first_order="gradients", beside False: at flat index',
        frozenset({"meta_gradients_exact", "checkpoint_changes_nothing"}),
    ),
    "asks for the grad mode": Broken(
        "checkpoint_changes_nothing",
        build(asks_for_grad_mode),
        "under .* with checkpoint='sqrt', beside None",
    ),
    "looks at values": Broken(
        "make_fx_traces", build(looks_at_values), "the optimizer raised", frozenset(TRACERS)
    ),
    "on the CPU": Broken(
        "runs_on_meta", build(on_cpu), "the optimizer raised RuntimeError: .*device"
    ),
}


def broken_laws(optimizer, tree=SMALL, equivariance="coordinate", skip=("compiles_once",)):
    found = {}
    for name, law in LAWS.items():
        if name in skip:
            continue
        more = {"equivariance": equivariance} if name == "permutation_equivariant" else {}
        try:
            law.check(optimizer, tree, **more)
        except AssertionError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_exactly_the_right_law_catches_it(name):
    case = BROKEN[name]
    tree = {"a": SMALL["b"], "b": SMALL["b"] * 2} if name == "dicts by position" else SMALL
    found = broken_laws(case.optimizer, tree)
    assert set(found) == {case.law} | case.also, found
    assert found[case.law].startswith(f"law {case.law}: ")
    assert re.search(case.says, found[case.law], re.DOTALL), found[case.law]


def test_every_law_has_a_broken_optimizer():
    assert {case.law for case in BROKEN.values()} | {"compiles_once"} == set(LAWS)


def test_recompiling_is_caught():
    law = LAWS["compiles_once"].check
    with pytest.raises(AssertionError, match=r"compiled \d+ times in 6 steps \(again in step 2"):
        law(counting(), SMALL)
    with pytest.raises(AssertionError, match="the optimizer raised"):
        law(build(looks_at_values), SMALL)
    assert not broken_laws(counting())


def test_the_sound_optimizer_obeys_all():
    report = check_optimizer(build(), equivariance="coordinate")
    assert set(report.held) == set(LAWS)
    assert report.not_run == {}


def test_row_norms_are_equivariant_along_axes():
    assert not broken_laws(build(row_normed), equivariance="axes")
