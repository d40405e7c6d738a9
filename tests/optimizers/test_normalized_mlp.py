"""Celo2's rule: numbers of the original, tiles, transforms and the untrained start."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fmeta
from fmeta import trees
from fmeta._leafwise import consuming_update
from fmeta.optimizers import adamw, normalized_mlp
from fmeta.optimizers._normalized_mlp import from_celo2
from fmeta.random import fold_in

FILE = Path(__file__).parent.parent / "reference" / "celo2.npz"
ARRAYS = dict(np.load(FILE))
RULE = {k.removeprefix("rule/"): v for k, v in ARRAYS.items() if k.startswith("rule/")}
NAMES = [k.removeprefix("init/") for k in ARRAYS if k.startswith("init/")]
WD, LR = 0.1, 0.01
CASES = {
    "base_all": {"vectors": "rule"},
    "base": {"weight_decay": WD},
    "orthogonalized": {"weight_decay": WD, "orthogonalize": True, "vector_lr_mult": 2.0},
}


def original(case, dtype=torch.float32, **more):
    """Largest error over each trajectory, in displacements, after 8 ulp of the parameter."""
    arguments = CASES[case]
    decay, rate = arguments.get("weight_decay", 0.0), LR * arguments.get("vector_lr_mult", 1.0)
    rules = {
        "rule": normalized_mlp(lr=LR, **arguments, **more),
        "adamw": adamw(rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay),
    }
    # Only in `base_all` the embedding's numbers are those of the learned rule.
    by_adamw = "embed" if case != "base_all" else ""
    optimizer = fmeta.partition(rules, lambda path, p: "adamw" if path == by_adamw else "rule")
    th = {"rule": from_celo2(RULE), "adamw": {}}
    start = {k: torch.from_numpy(ARRAYS[f"init/{k}"]) for k in NAMES}
    params = trees.cast(start, dtype)
    hidden = optimizer.init_hidden(th, params)
    errors, moved = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for t in range(20):
        g = {k: torch.from_numpy(ARRAYS[f"grads/{k}"][t]).to(dtype) for k in NAMES}
        params, hidden = optimizer.step(th, params, g, hidden)
        for k in NAMES:
            want = torch.from_numpy(ARRAYS[f"{case}/{k}"][t])
            off = ((params[k] - want).abs() - 8 * 2**-23 * want.abs()).clamp(min=0)
            errors[k] = max(errors[k], off.max().item())
            moved[k] = max(moved[k], (want - start[k]).abs().max().item())
    return {k: errors[k] / moved[k] for k in NAMES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "more", [{}, {"dtype": torch.float64}, {"chunk_size": 7}, {"chunk_size": 40}]
)
def test_the_original_trajectories_are_reproduced(case, more):
    for name, error in original(case, **more).items():
        assert error < 3e-5, name


# -- tiles -------------------------------------------------------------------------------------

SHAPES = [(5, 3), (3, 5), (1, 7), (7, 1), (6, 6), (3, 2, 4), (2, 3, 45, 50), (4, 3, 3, 3), (60, 70)]


def without_tiles(rule, th, p, g, h):
    """A step as it is made where a derivative is recorded, which no tile may hide."""
    learned = trees.map(lambda x: x.clone().requires_grad_(), th)
    return trees.map(torch.Tensor.detach, rule.step(learned, p, g, h))


# Sizes that cut into single coordinates, rows, parts of a large matrix.
TILES = [(s, c) for s in SHAPES for c in ((1, 7) if np.prod(s) < 200 else (100, 2300))]


@pytest.mark.parametrize(("shape", "chunk_size"), TILES)
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_tiles_give_the_plain_result_to_rounding(shape, orthogonalize, chunk_size):
    th = from_celo2(RULE)
    arguments = {"lr": 0.1, "weight_decay": 0.01, "orthogonalize": orthogonalize}
    tiled, plain = normalized_mlp(**arguments, chunk_size=chunk_size), normalized_mlp(**arguments)
    generator = fold_in(4, *shape)
    draw = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)
    p = q = draw()
    h = k = plain.init_hidden(th, p)
    for _ in range(2):
        g = draw()
        p, h = without_tiles(plain, th, p, g, h)
        q, k = tiled.step(th, q, g, k)
    torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(k, h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_transform_never_meets_the_tiles(chunk_size):
    """With tiny tiles derivatives, batches and traces are those of the plain path."""
    rule = normalized_mlp(lr=0.1, weight_decay=0.01, chunk_size=chunk_size)
    plain = normalized_mlp(lr=0.1, weight_decay=0.01, chunk_size=10**9)
    th = trees.cast(from_celo2(RULE), torch.float64)
    generator = fold_in(5)
    p = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    g, v = (torch.randn(p.shape, generator=generator, dtype=p.dtype) for _ in range(2))

    def f(rule):
        def run(p, g):
            h = rule.init_hidden(th, p)
            for _ in range(2):
                p, h = rule.step(th, p, g * p, h)
            return p

        return run

    close = torch.testing.assert_close
    close(
        grad(lambda p: f(rule)(p, g).square().sum())(p),
        grad(lambda p: f(plain)(p, g).square().sum())(p),
    )
    close(jvp(f(rule), (p, g), (v, v)), jvp(f(plain), (p, g), (v, v)))
    stacked = torch.stack([g, v])
    got = vmap(f(rule), in_dims=(None, 0))(p, stacked)
    close(got, torch.stack([f(plain)(p, x) for x in stacked]))
    leaf = p.clone().requires_grad_()
    f(rule)(leaf, g).sum().backward()
    close(leaf.grad, grad(lambda p: f(plain)(p, g).sum())(p))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p, v)
        tangent = torch.autograd.forward_ad.unpack_dual(f(rule)(dual, g)).tangent
    close(tangent, jvp(lambda p: f(plain)(p, g), (p,), (v,))[1])
    close(make_fx(f(rule))(p, g)(v, g), f(plain)(v, g))


def test_the_default_tiles_of_a_large_tensor_give_the_plain_result():
    rule = normalized_mlp(lr=0.1)
    th = rule.init()
    p = torch.randn(300, 250, generator=fold_in(6))
    h = rule.init_hidden(th, p)
    torch.testing.assert_close(rule.step(th, p, p, h), without_tiles(rule, th, p, p, h))


@pytest.mark.parametrize("each", [False, True], ids=["one_number", "number_each"])
@pytest.mark.parametrize("packed", [False, True], ids=["own_memory", "packed_memory"])
@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (3, 6, 1, 1), (2, 40, 60), (6, 5)])
def test_a_consumed_state_of_stacks_gives_the_plain_result(shape, packed, each):
    generator = fold_in(7, *shape)
    draw = lambda: [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "abc"]
    lr = [torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.2, 0.3)] if each else 0.1
    rule = normalized_mlp(lr=lr, weight_decay=0.01)
    th, consumes = from_celo2(RULE), consuming_update(rule)
    assert consumes is not rule.update
    p = q = draw()
    h = rule.init_hidden(th, p)
    # A state that was saved has its axes in the given order.
    k = trees.map(lambda x: x.clone(memory_format=torch.contiguous_format) if packed else x, h)
    h = trees.map(torch.clone, h)
    for _ in range(3):
        g = draw()
        p, h = without_tiles(rule, th, p, g, h)
        delta, k = consumes(th, q, g, k)
        q = trees.map(torch.add, q, delta)
    torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(k, h, rtol=1e-12, atol=1e-12)


def test_small_matrices_keep_their_order_of_memory():
    rule, params = normalized_mlp(), [torch.ones(4, 5, 3, 3) for _ in range(3)]
    th = rule.init()
    h = rule.init_hidden(th, params)
    for _ in range(3):
        before = [leaf["m0"].data_ptr() for leaf in h.leaves]
        _, h = consuming_update(rule)(th, params, params, h)
        assert all(leaf[name].stride(1) == 1 for leaf in h.leaves for name in ("m0", "rms"))
    # From the second step on, in the same memory.
    assert [leaf["m0"].data_ptr() for leaf in h.leaves] == before


# -- derivatives and odd leaves ----------------------------------------------------------------

TREE = {"w": (3, 4), "conv": (2, 3, 3, 3), "b": (3,), "s": (), "none": (0, 3), "empty": (0,)}


def draw_tree(generator, dtype=torch.float64):
    return {k: torch.randn(s, generator=generator, dtype=dtype) for k, s in TREE.items()}


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("vectors", ["adamw", "rule"])
def test_meta_gradient_is_the_finite_difference(orthogonalize, vectors):
    rule = normalized_mlp(0.05, 0.1, orthogonalize, vectors)
    th = trees.cast(rule.init(fold_in(1)), torch.float64)
    generator = fold_in(7)
    params, target, along = draw_tree(generator), draw_tree(generator), {}
    for k, v in th.items():
        along[k] = torch.randn(v.shape, generator=generator, dtype=v.dtype)

    def meta(th):
        loss = lambda p, t: sum(((p[k] - t[k]) ** 2).sum() for k in p)
        batches = {k: torch.stack([v, v + 0.1, v - 0.2]) for k, v in target.items()}
        return fmeta.unroll(rule, loss, th, params, batches).losses.sum()

    gradient = grad(meta)(th)
    got = sum((gradient[k] * along[k]).sum() for k in th)
    e = 1e-6
    up, down = (meta({k: th[k] + s * along[k] for k in th}) for s in (e, -e))
    torch.testing.assert_close(got, (up - down) / (2 * e), rtol=1e-5, atol=1e-8)
    for x in trees.leaves(
        grad(lambda th: sum(x.square().sum() for x in grad(meta)(th).values()))(th)
    ):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arguments", [{}, {"orthogonalize": True, "vectors": "rule"}])
def test_zero_gradients_and_parameters_give_finite_meta_gradients(dtype, arguments):
    rule = normalized_mlp(**arguments)
    th = trees.cast(rule.init(), dtype)
    p = {k: torch.zeros(s, dtype=dtype) for k, s in TREE.items()}

    def meta(th, p):
        q, h = rule.step(th, p, p, rule.init_hidden(th, p))
        q, h = rule.step(th, q, p, h)
        return sum((x + 1).square().sum() for x in q.values())

    for x in trees.leaves(grad(meta, argnums=(0, 1))(th, p)):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("vectors", ["adamw", "rule"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_odd_leaves_on_meta_and_in_other_dtypes(vectors, dtype):
    rule = normalized_mlp(vectors=vectors, chunk_size=4)
    th, p = rule.init(), draw_tree(fold_in(8), torch.float32)
    p = {k: v.to(dtype) for k, v in p.items()}
    h = rule.init_hidden(th, p)
    q, k = rule.step(th, p, p, h)
    assert all(torch.isfinite(x).all() for x in trees.leaves((q, k)))
    on_meta = trees.map(lambda x: x.to("meta"), (th, p, p, h))
    for got, want in zip(trees.leaves(rule.step(*on_meta)), trees.leaves((q, k)), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


def test_many_leaves_of_one_shape_equal_each_alone():
    rule = normalized_mlp(vectors="rule", weight_decay=0.1)
    th, generator = rule.init(), fold_in(9)
    params = {str(i): torch.randn(3, 4, generator=generator) for i in range(5)}
    new, _ = rule.step(th, params, params, rule.init_hidden(th, params))
    for k, p in params.items():
        torch.testing.assert_close(new[k], rule.step(th, p, p, rule.init_hidden(th, p))[0])


def test_the_scale_of_the_loss_does_not_matter():
    rule = normalized_mlp(lr=0.1)
    th = {**rule.init(), "b0": torch.zeros(8)}
    w0 = th["w0"].clone()
    w0[1] = 0.0  # but for the clipped gradient
    th["w0"] = w0
    p = torch.randn(6, 5, generator=fold_in(10))
    g = torch.randn(6, 5, generator=fold_in(11))
    steps = [rule.update(th, p, s * g, rule.init_hidden(th, p))[0] for s in (1.0, 8.0)]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-4)
    assert steps[0].square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-4)


# -- the untrained rule, files, arguments ------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"vectors": "rule"}, {"orthogonalize": True}])
def test_the_untrained_rule_trains_on_digits(arguments):
    digits = load_digits()
    x = torch.from_numpy(digits.data).float() / 16
    y = torch.from_numpy(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    apply, params, buffers = fmeta.functionalize(net)
    rows = torch.randint(len(x), (50, 128), generator=fold_in(12))
    loss = lambda p, i: nn.functional.cross_entropy(apply(p, buffers, x[i]), y[i])
    for seed in range(2):
        rule = normalized_mlp(lr=1e-2, **arguments)
        losses = fmeta.unroll(rule, loss, rule.init(fold_in(seed)), params, rows).losses
        assert losses[:5].mean() > 1.8
        assert losses[-5:].mean() < 0.7
        default = normalized_mlp(**arguments)
        losses = fmeta.unroll(default, loss, default.init(fold_in(seed)), params, rows).losses
        assert losses[-5:].mean() < losses[:5].mean() - 0.2


def test_the_weights_have_one_structure_whatever_the_arguments():
    shapes = lambda rule: {k: tuple(v.shape) for k, v in rule.init().items()}
    want = shapes(normalized_mlp())
    assert want["w0"] == (30, 8)
    for case in CASES.values():
        assert shapes(normalized_mlp(**case)) == want
    assert {k: tuple(v.shape) for k, v in from_celo2(RULE).items()} == want


def test_wrong_arrays_are_refused_by_name():
    with pytest.raises(ValueError, match=r"array w0\.3 is missing"):
        from_celo2({k: v for k, v in RULE.items() if k != "w0.3"})
    with pytest.raises(ValueError, match=r"unknown Celo2 array dense_w\.2"):
        from_celo2({**RULE, "dense_w.2": RULE["b0"]})
    with pytest.raises(ValueError, match=r"dense_w\.1 has shape \(3, 8\), not \(8, 3\)"):
        from_celo2({**RULE, "dense_w.1": RULE["dense_w.1"].T})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vectors": "adam"}, "vectors must be 'adamw' or 'rule', got 'adam'"),
        ({"lr": -1.0}, "lr must be not negative"),
        ({"weight_decay": float("nan")}, "weight_decay must be not negative"),
        ({"vector_lr_mult": -0.5}, "vector_lr_mult must be not negative"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_senseless_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        normalized_mlp(**arguments)
