"""The coordinatewise LSTM against torch's own cells, one coordinate at a time."""

import pytest
import torch
from torch import nn
from torch.func import grad, jacfwd, vmap

import fmeta
from fmeta import trees
from fmeta.optimizers import lstm
from fmeta.random import fold_in

STEPS = 4


def tree(draw):
    return {"w": draw(3, 2), "s": draw(), "deep": [draw(2)]}


def problem(dtype=torch.float64):
    generator = fold_in(0, 1)
    params = tree(lambda *s: torch.randn(s, generator=generator, dtype=dtype))
    # Gradients over many orders of magnitude, both branches of the preprocessing and zero.
    grads = [
        trees.map(
            lambda p: (
                torch.randn(p.shape, generator=generator, dtype=dtype)
                * torch.logspace(-9, 2, max(p.numel(), 1), dtype=dtype)[: p.numel()].reshape(
                    p.shape
                )
            ),
            params,
        )
        for _ in range(STEPS)
    ]
    grads[1]["w"] = torch.zeros_like(grads[1]["w"])
    return params, grads


def preprocess_one(g, q):
    if abs(g) >= torch.tensor(-q).exp().item():
        return [g.abs().log().item() / q, g.sign().item()]
    return [-1.0, (torch.tensor(q, dtype=torch.float64).exp() * g).item()]


@pytest.mark.parametrize(("hidden_size", "num_layers", "q"), [(20, 2, 10.0), (3, 1, 5.0)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_every_coordinate_is_a_torch_lstm_of_its_own(hidden_size, num_layers, q, chunk_size):
    rule = lstm(hidden_size, num_layers, q, output_scale=0.3, chunk_size=chunk_size)
    th = rule.init(fold_in(3))
    cells = [nn.utils.skip_init(nn.LSTMCell, 2, hidden_size, dtype=torch.float64)]
    for _ in range(num_layers - 1):
        cells.append(nn.utils.skip_init(nn.LSTMCell, hidden_size, hidden_size, dtype=torch.float64))
    read_out = nn.utils.skip_init(nn.Linear, hidden_size, 1, dtype=torch.float64)
    net = nn.ModuleDict({"layers": nn.ModuleList(cells), "output": read_out})
    net.load_state_dict(th)  # the names are torch's
    params, grads = problem()
    hidden = rule.init_hidden(th, params)
    states = {}
    with torch.no_grad():
        for g in grads:
            delta, hidden = rule.update(th, params, g, hidden)
            for path, d, gs in zip(
                trees.paths(params), trees.leaves(delta), trees.leaves(g), strict=True
            ):
                for i, one in enumerate(gs.reshape(-1)):
                    x = torch.tensor([preprocess_one(one, q)], dtype=torch.float64)
                    for layer, cell in enumerate(cells):
                        state = cell(x, states.get((path, i, layer)))
                        states[path, i, layer] = state
                        x = state[0]
                    want = 0.3 * read_out(x).item()
                    assert d.reshape(-1)[i].item() == pytest.approx(want, abs=1e-6)
    h, c = states["w", 5, num_layers - 1]
    last = hidden.leaves["w"]
    torch.testing.assert_close(last["h"][2, 1, -1], h[0])
    torch.testing.assert_close(last["c"][2, 1, -1], c[0])
    assert last["h"].shape == (3, 2, num_layers, hidden_size)


def meta_loss(rule, th, params, scale=1.0):
    def loss(p, x):
        return scale * sum((t - x).square().sum() for t in trees.leaves(p))

    xs = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    return fmeta.unroll(rule, loss, th, params, xs).losses.sum()


def test_meta_gradient_is_the_finite_difference():
    rule = lstm(hidden_size=5, output_scale=0.5)
    th = trees.cast(rule.init(fold_in(1)), torch.float64)
    params, _ = problem()
    generator = fold_in(2)
    along = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in th.items()}
    gradient = grad(lambda th: meta_loss(rule, th, params))(th)
    got = sum((gradient[k] * along[k]).sum() for k in th)
    step = 1e-5
    up, down = (
        meta_loss(rule, {k: th[k] + s * along[k] for k in th}, params) for s in (step, -step)
    )
    torch.testing.assert_close(got, (up - down) / (2 * step), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1e-300, -1e-6, 1.0])
def test_three_derivatives_by_the_gradient_are_finite(value):
    rule = lstm(hidden_size=3)
    th = trees.cast(rule.init(), torch.float64)
    p = torch.zeros(1, dtype=torch.float64)
    hidden = rule.init_hidden(th, p)
    f = lambda g: rule.update(th, p, g.reshape(1), hidden)[0].sum()
    g = torch.tensor(value, dtype=torch.float64)
    for derivative in (f, jacfwd(f), jacfwd(jacfwd(f)), grad(jacfwd(jacfwd(f)))):
        assert torch.isfinite(derivative(g))


def test_vmap_over_rules_equals_a_loop():
    rule = lstm(hidden_size=4)
    ths = [trees.cast(rule.init(fold_in(i)), torch.float64) for i in range(3)]
    params, _ = problem()
    stacked = {k: torch.stack([th[k] for th in ths]) for k in ths[0]}
    f = grad(lambda th: meta_loss(rule, th, params))
    got = vmap(f)(stacked)
    for i, th in enumerate(ths):
        for k, want in f(th).items():
            torch.testing.assert_close(got[k][i], want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"num_layers": True}, "num_layers must be a positive integer"),
        ({"preprocess_factor": 0.0}, "preprocess_factor must be positive"),
        ({"output_scale": float("nan")}, "output_scale must be not negative"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_senseless_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lstm(**arguments)
