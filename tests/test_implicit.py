"""`implicit_gradient` against closed forms, an exact solve of another program, and itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fmeta
from fmeta import fewshot
from fmeta.random import fold_in

DATA = np.load(Path(__file__).parent / "reference" / "meta_gradient.npz")
WAYS = {
    "exact": {"solver": "exact"},
    "cg": {"solver": "cg", "num_iterations": 60},
    "neumann": {"solver": "neumann", "num_iterations": 600, "step_size": 0.2},
}


def array(key):
    return torch.from_numpy(np.asarray(DATA[key]))


def keys(case):
    return {k.split("/", 1)[1] for k in DATA.files if k.startswith(f"{case}/")}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_a_quadratic_equals_the_reference(way):
    a, b, c, e = (array(f"imaml_quad/{k}") for k in ("A", "b", "C", "e"))
    theta = array("imaml_quad/theta")
    meta = {"theta": theta, "lam": torch.tensor(2.0, dtype=torch.float64)}

    def inner(p, m):
        near = m["lam"] / 2 * (p - m["theta"]).square().sum()
        return p @ a @ p / 2 - b @ p + near

    outer = lambda p, m: p @ c @ p / 2 - e @ p
    phi = array("imaml_quad/phi_star")
    found = fmeta.implicit_gradient(inner, outer, phi, meta, **WAYS[way])
    torch.testing.assert_close(
        found.grads["theta"], array("imaml_quad/meta_grad"), rtol=1e-8, atol=1e-9
    )
    torch.testing.assert_close(
        found.grads["lam"], array("imaml_quad/grad_lam"), rtol=1e-8, atol=1e-9
    )
    assert found.residual < 1e-8
    assert found.slope < 1e-9


@pytest.mark.parametrize("way", WAYS)
def test_logistic_regression_equals_the_reference(way):
    case = "imaml_logistic"
    x, y = array(f"{case}/x_train"), array(f"{case}/y_train").double()
    xv, yv = array(f"{case}/x_val"), array(f"{case}/y_val").double()
    lam = torch.as_tensor(float(array(f"{case}/lam")) if "lam" in keys(case) else 2.0)
    meta = {"theta": array(f"{case}/theta"), "lam": lam.double()}

    def inner(p, m):
        near = m["lam"] / 2 * (p - m["theta"]).square().sum()
        return F.binary_cross_entropy_with_logits(x @ p, y) + near

    outer = lambda p, m: F.binary_cross_entropy_with_logits(xv @ p, yv)
    found = fmeta.implicit_gradient(inner, outer, array(f"{case}/phi_star"), meta, **WAYS[way])
    torch.testing.assert_close(found.loss, array(f"{case}/val_loss"), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        found.grads["theta"], array(f"{case}/meta_grad"), rtol=1e-8, atol=1e-9
    )
    torch.testing.assert_close(found.grads["lam"], array(f"{case}/grad_lam"), rtol=1e-8, atol=1e-9)


def test_it_is_the_same_for_each_task_under_vmap():
    a = torch.randn(3, 4, 4, generator=fold_in(0), dtype=torch.float64)
    a = a @ a.mT + torch.eye(4)
    meta = torch.randn(3, 4, generator=fold_in(1), dtype=torch.float64)
    start = torch.linalg.solve(a, meta)

    def one(a, meta, p):
        inner = lambda p, m: p @ a @ p / 2 - m @ p
        return fmeta.implicit_gradient(inner, lambda p, m: (p**3).sum(), p, meta).grads

    together = torch.vmap(one)(a, meta, start)
    torch.testing.assert_close(together, torch.linalg.solve(a, 3 * start**2), rtol=1e-7, atol=1e-9)
    alone = torch.stack([one(*x) for x in zip(a, meta, start, strict=True)])
    torch.testing.assert_close(together, alone)


def test_damping_is_added_to_the_diagonal_and_a_residual_tells_too_few_iterations():
    a = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    m = torch.ones(3, dtype=torch.float64)
    inner, outer = lambda p, m: p @ a @ p / 2 - m @ p, lambda p, m: p.sum()
    p = m / a.diag()
    found = fmeta.implicit_gradient(inner, outer, p, m, damping=5.0)
    torch.testing.assert_close(found.grads, 1 / (a.diag() + 5))
    few = fmeta.implicit_gradient(inner, outer, p, m, num_iterations=1)
    assert few.residual > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "lu"}, "solver must be one of cg, neumann, exact"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"damping": -1.0}, "damping must be at least 0"),
        ({"step_size": 0.0}, "step_size above 0"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(options, message):
    p = torch.ones(1)
    with pytest.raises(ValueError, match=message):
        fmeta.implicit_gradient(lambda p, m: p.sum(), lambda p, m: p.sum(), p, p, **options)


def test_numbers_of_numpy_are_numbers():
    p, m = torch.ones(3), torch.arange(3.0)
    inner, outer = lambda p, m: (p - m).square().sum(), lambda p, m: p.square().sum()
    got = fmeta.implicit_gradient(
        inner, outer, p, m, num_iterations=np.int64(3), damping=np.float32(0.5)
    )
    want = fmeta.implicit_gradient(inner, outer, p, m, num_iterations=3, damping=0.5)
    assert torch.equal(got.grads, want.grads)


def test_imaml_at_its_optimum_is_the_derivative_of_its_loss():
    """Finite differences through inner training that has converged."""
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)
    ).double()
    for i, p in enumerate(net.parameters()):
        p.data = 0.5 * torch.randn(p.shape, generator=fold_in(9, i), dtype=p.dtype)
    drawn = fewshot.draw(fewshot.sinusoid(5, 5), [(0, 0), (0, 1)])
    episodes = fewshot.Episode(
        *(fewshot.Examples(e.x.double() / 5, e.y.double() / 5) for e in drawn[:2])
    )
    learner = fewshot.imaml(net, lr=0.2, num_steps=150, proximal=1.0, num_iterations=12, loss="mse")
    start = learner.init()
    found = learner.estimate(start, episodes)
    way = {
        k: torch.randn(v.shape, generator=fold_in(3), dtype=v.dtype)
        for k, v in start["model_params"].items()
    }
    e = 1e-5

    def at(sign):
        params = {k: v + sign * e * way[k] for k, v in start["model_params"].items()}
        return learner.estimate({**start, "model_params": params}, episodes).loss

    slope = sum((found.grads["model_params"][k] * way[k]).sum() for k in way)
    torch.testing.assert_close((at(1) - at(-1)) / (2 * e), slope, rtol=1e-5, atol=1e-8)
    adapted = learner.adapt(start, fewshot.Examples(*(t[0] for t in episodes.support)), num_steps=3)
    assert adapted.losses.shape == (3,)
