"""Meta-curvature is a Kronecker product on the flat gradient, and learns what a rate cannot."""

import functools

import pytest
import torch
from torch.func import grad, vmap

import fmeta
from fmeta import optimizers, trees
from fmeta.optimizers import meta_curvature
from fmeta.random import fold_in
from fmeta.testing import LAWS, check_optimizer

DOUBLE = {"dtype": torch.float64}


def normal(*shape, key=0):
    return torch.randn(shape, generator=fold_in(11, key, *shape), **DOUBLE)


PARAMS = {
    "scalar": normal(),
    "vector": normal(4),
    "matrix": normal(3, 5),
    "filter": normal(2, 3, 4),
    "kernel": normal(3, 2, 2, 3),
    "volume": normal(2, 2, 1, 2, 2),
}
SIZES = {
    "scalar": (1,),
    "vector": (4,),
    "matrix": (3, 5),
    "filter": (2, 3, 4),
    "kernel": (3, 2, 6),
    "volume": (2, 2, 4),
}


def perturbed(rule, size=0.3):
    """Its opt_params, away from where they start."""
    flat, spec = trees.flatten(rule.init())
    moved = [
        x + size * torch.randn(x.shape, generator=fold_in(12, i), dtype=x.dtype)
        for i, x in enumerate(flat)
    ]
    return trees.unflatten(spec, moved)


def delta_of(rule, th, g, params=PARAMS):
    return rule.update(th, params, g, rule.init_hidden(th, params))[0]


@pytest.mark.parametrize("max_size", [1024, 3, 0], ids=["full", "diagonals above 3", "diagonals"])
@pytest.mark.parametrize("name", PARAMS)
def test_the_update_is_an_explicit_kronecker_product(name, max_size):
    rule = meta_curvature(PARAMS, lr=0.5, max_size=max_size)
    th = perturbed(rule)
    axes = th["axes"][name]
    assert [tuple(m.shape) for m in axes] == [
        (n, n) if n <= max_size else (n,) for n in SIZES[name]
    ]
    matrices = [torch.diag(m) if m.ndim == 1 else m for m in axes]
    g = normal(*PARAMS[name].shape, key=1)
    want = -th["lr"] * functools.reduce(torch.kron, matrices) @ g.flatten()
    got = delta_of(rule, th, {k: g if k == name else None for k in PARAMS})
    torch.testing.assert_close(got[name].flatten(), want, rtol=1e-13, atol=1e-13)
    assert all(got[k] is None for k in PARAMS if k != name)


def test_of_a_matrix_it_is_a_product_from_both_sides():
    rule = meta_curvature({"w": PARAMS["matrix"]}, lr=1.0)
    th = perturbed(rule)
    left, right = th["axes"]["w"]
    g = normal(3, 5, key=2)
    got = delta_of(rule, th, {"w": g}, {"w": PARAMS["matrix"]})["w"]
    torch.testing.assert_close(got, -th["lr"] * left @ g @ right.mT, rtol=1e-13, atol=1e-13)


def test_untrained_it_is_gradient_descent():
    rule = meta_curvature(PARAMS, lr=0.1)
    g = {k: normal(*p.shape, key=3) for k, p in PARAMS.items()}
    sgd = optimizers.sgd(0.1)
    trees.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=1e-14, atol=0),
        delta_of(rule, rule.init(), g),
        delta_of(sgd, {}, g),
    )


@pytest.mark.parametrize("max_size", [1024, 2])
def test_the_meta_gradient_is_the_finite_difference(max_size):
    params = {k: PARAMS[k] for k in ("scalar", "vector", "matrix", "kernel")}
    rule = meta_curvature(params, lr=0.05, max_size=max_size)
    th = perturbed(rule, 0.1)
    targets = {k: normal(3, *p.shape, key=4) for k, p in params.items()}
    loss = lambda p, b: sum(((p[k] - b[k]).square() + torch.sin(p[k])).sum() for k in p)

    def meta(th, p):
        run = fmeta.unroll(rule, loss, th, p, targets)
        return run.losses.sum() + loss(run.params, trees.map(lambda b: b[0], targets))

    for argument, tree in enumerate((th, params)):
        flat, spec = trees.flatten(tree)
        slopes = trees.leaves(grad(meta, argnums=argument)(th, params))
        for i, (x, slope) in enumerate(zip(flat, slopes, strict=True)):
            v = torch.randn(x.shape, generator=fold_in(13, i), **DOUBLE)

            def moved(e, i=i, v=v, flat=flat, spec=spec, argument=argument):
                new = trees.unflatten(
                    spec, [y + e * v if j == i else y for j, y in enumerate(flat)]
                )
                return meta(*((new, params) if argument == 0 else (th, new)))

            numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
            torch.testing.assert_close((slope * v).sum(), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("max_size", [1024, 2])
def test_every_law_away_from_the_identity(max_size):
    def build(params):
        rule = meta_curvature(params, lr=0.1, max_size=max_size)
        return rule._replace(init=lambda generator=None: perturbed(rule))

    report = check_optimizer(build)
    assert set(report.held) == set(LAWS) - {"permutation_equivariant"}
    for symmetry in ("axes", "coordinate"):  # its matrices know the coordinates
        with pytest.raises(AssertionError, match="permuted"):
            check_optimizer(build, equivariance=symmetry, laws=["permutation_equivariant"])


def ill_conditioned(key, rows=6, columns=4, condition=100.0):
    """``|A (W - T) B|^2`` with axes of very unequal curvature, the same in all tasks, and the task.

    Its Hessian is a Kronecker product, the inverse of which one step of meta-curvature can learn.
    """

    def curved(n, seed):
        basis = torch.linalg.qr(torch.randn(n, n, generator=fold_in(21, seed), **DOUBLE))[0]
        return (basis * torch.logspace(0, -0.5, n, base=condition, **DOUBLE)) @ basis.mT

    a, b = curved(rows, 0), curved(columns, 1)
    target = torch.randn(rows, columns, generator=fold_in(22, key), **DOUBLE)
    return a, b, target


def test_meta_trained_it_descends_an_ill_conditioned_family_in_one_step():
    start = torch.zeros(6, 4, **DOUBLE)
    a, b, _ = ill_conditioned(0)
    train = torch.stack([ill_conditioned(k)[2] for k in range(32)])
    test = torch.stack([ill_conditioned(k)[2] for k in range(100, 132)])
    loss = lambda p, target: 0.5 * (a @ (p - target) @ b).square().sum()

    def after_one_step(rule, th, target):
        g = grad(loss)(start, target)
        return loss(rule.step(th, start, g, rule.init_hidden(th, start))[0], target)

    def meta_trained(rule):
        meta = lambda th: vmap(lambda t: after_one_step(rule, th, t))(train).mean()
        outer = optimizers.adam(0.02)
        th, hidden = rule.init(), outer.init_hidden({}, rule.init())
        for _ in range(300):
            th, hidden = outer.step({}, th, grad(meta)(th), hidden)
        return float(vmap(lambda t: after_one_step(rule, th, t))(test).mean())

    before = float(vmap(lambda t: loss(start, t))(test).mean())
    by_rate = meta_trained(
        fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=torch.tensor(0.1, **DOUBLE))
    )
    by_matrices = meta_trained(meta_curvature(start, lr=0.1))
    assert by_rate < before
    assert by_matrices < by_rate / 3, f"{before=:.3f} {by_rate=:.3f} {by_matrices=:.3f}"


WRONG = {
    "a rate": (lambda: meta_curvature(PARAMS, lr=-1.0), ValueError, "lr must be not negative"),
    "rates": (lambda: meta_curvature(PARAMS, lr=torch.ones(2)), ValueError, "lr must be a scalar"),
    "a size": (lambda: meta_curvature(PARAMS, max_size=2.5), ValueError, "max_size must be an int"),
    "integers": (
        lambda: meta_curvature({"n": torch.arange(3)}),
        TypeError,
        "path n is torch.int64",
    ),
    "nothing": (lambda: meta_curvature({"n": None}), TypeError, "path n is NoneType"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_refused(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_other_parameters_than_those_it_was_built_for():
    rule = meta_curvature({"w": torch.zeros(3, 2)})
    th, other = rule.init(), {"w": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=r"axes of 3, 2, but a parameter has shape \(4, 2\)"):
        rule.step(th, other, other, rule.init_hidden(th, other))
    named = {"v": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=r"axes \(a tree\) is not shaped like the parameters"):
        rule.step(th, named, named, rule.init_hidden(th, named))
