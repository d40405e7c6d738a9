"""adafactor_mlp: tiles, stacks and reused memory equal the plain form; derivatives; errors."""

import math

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

import fmeta
from fmeta import trees
from fmeta._leafwise import consuming_update
from fmeta.optimizers import _tiled_network, adafactor_mlp
from fmeta.random import fold_in

LOUD = {"exp_mult": 0.1, "step_mult": 0.1}
OTHER = {
    "hidden_size": 6,
    "hidden_layers": 1,
    "initial_momentum_decays": (0.9, 0.95),
    "initial_rms_decays": (0.9, 0.99),
    "initial_adafactor_decays": (0.8, 0.99),
}
ARGUMENTS = pytest.mark.parametrize("arguments", [{}, OTHER], ids=["default", "other sizes"])
SHAPES = [(), (1,), (7,), (5, 3), (3, 5), (1, 7), (6, 6), (3, 2, 4), (4, 3, 3, 3), (5, 4, 7, 7)]


def drawn(shape, *key, dtype=torch.float64):
    return torch.randn(shape, generator=fold_in(3, *key, *shape), dtype=dtype)


def weights(rule, dtype=torch.float64):
    """A start of the rule, but for decays, and biases that keep dead units off a ReLU's kink."""
    th = trees.cast(rule.init(fold_in(1)), dtype)
    moved = lambda k, x: x + 0.03 * drawn(x.shape, len(k), dtype=dtype)
    return {k: x if k[0] == "w" else moved(k, x) for k, x in th.items()}


def run(rule, th, start, grads, update=None):
    """Parameters and state after some steps."""
    p, h = start, rule.init_hidden(th, start)
    for g in grads:
        delta, h = (update or rule.update)(th, p, g, h)
        p = fmeta.apply_updates(p, delta)
    return p, h


def plain(rule, th, start, grads):
    """The same where derivatives are recorded, which the tiles are not for."""
    observed = {k: x.clone().requires_grad_() for k, x in th.items()}
    found = run(rule, observed, start, grads)
    assert trees.leaves(found)[0].requires_grad
    return trees.map(torch.Tensor.detach, found)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


# -- tiles, stacks, memory ---------------------------------------------------------------------


@ARGUMENTS
@pytest.mark.parametrize("chunk_size", [1, 7, 40, None])
def test_tiles_give_the_plain_result_to_rounding(arguments, chunk_size):
    rule = adafactor_mlp(**LOUD, **arguments, chunk_size=chunk_size)
    th = weights(rule)
    start = {str(s): drawn(s) for s in SHAPES}
    grads = [{k: drawn(p.shape, i) for k, p in start.items()} for i in range(3)]
    close(run(rule, th, start, grads), plain(rule, th, start, grads))


def test_the_default_tiles_of_a_large_tensor_give_the_plain_result():
    rule = adafactor_mlp(**LOUD)
    th = weights(rule)
    for shape in ((300, 250), (70, 60, 3, 3), (90_000,), (2, 60_000)):
        start, grads = drawn(shape), [drawn(shape, i) for i in range(2)]
        close(run(rule, th, start, grads), plain(rule, th, start, grads))


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
@pytest.mark.parametrize("coordinates", [1, 5, 13, 60, 200])
def test_pieces_of_a_tile_are_of_one_leaf_or_of_several(coordinates, hidden_layers, monkeypatch):
    rule = adafactor_mlp(6, hidden_layers, **LOUD)
    numbers = 6 * hidden_layers + 2  # of all layers, a coordinate
    monkeypatch.setattr(_tiled_network, "_NEARER", coordinates * numbers)
    pieces = []
    called = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda y, *a: (pieces.append(y.shape[1]), called(y, *a))[1]
    )
    th, shapes = weights(rule), [(5, 3), (6, 6), (4, 3, 3, 3), (7,)]
    start = {f"{s} {i}": drawn(s, i) for s in shapes for i in range(3)}
    grads = [{k: drawn(p.shape, i, len(k)) for k, p in start.items()} for i in range(3)]
    found = run(rule, th, start, grads, consuming_update(rule))
    assert max(pieces) <= coordinates
    assert (max(pieces) > 36) == (coordinates > 36)
    close(found, plain(rule, th, start, grads))


def test_tensors_that_do_not_lie_in_order_in_memory():
    rule = adafactor_mlp(**LOUD, chunk_size=16)
    th = weights(rule)
    start, grads = drawn((6, 8)), [drawn((6, 8), i) for i in range(2)]
    turned = run(rule, th, start.mT.contiguous().mT, [g.mT.contiguous().mT for g in grads])
    close(turned, run(rule, th, start, grads))


@pytest.mark.parametrize("chunk_size", [None, 9])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 3, 3)], ids=str)
def test_a_stack_of_leaves_equals_each_alone(shape, chunk_size):
    rule = adafactor_mlp(**LOUD, chunk_size=chunk_size)
    th = weights(rule)
    start = {str(i): (1 + i) * drawn(shape, i) for i in range(5)}
    grads = [{k: drawn(shape, i, int(k)) for k in start} for i in range(3)]
    p, h = run(rule, th, start, grads)
    for k in start:
        q, state = run(rule, th, start[k], [g[k] for g in grads])
        close((p[k], h.leaves[k]), (q, state.leaves))


@pytest.mark.parametrize("shape", [(), (5,), (4, 3)], ids=str)
def test_the_form_that_reuses_memory_gives_the_same(shape):
    """Also with a leaf that has no gradient now and then, which the stack is then without."""
    rule = adafactor_mlp(**LOUD)
    th = weights(rule)
    start = {str(i): drawn(shape, i) for i in range(6)}
    grads = [{k: drawn(shape, i, int(k)) for k in start} for i in range(6)]
    grads[2]["3"] = grads[3]["0"] = None
    got = run(rule, th, start, grads, consuming_update(rule))
    close(got, run(rule, th, start, grads))
    again = consuming_update(rule)(th, got[0], grads[0], got[1])[1]
    for k, state in again.leaves.items():
        assert all(x.data_ptr() == got[1].leaves[k][n].data_ptr() for n, x in state.items())


def peak(call):
    """Bytes by which a call raises what is allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    sizes = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes
    assert kept is not None
    total = most = 0
    for size in sizes:
        total += size
        most = max(most, total)
    return most


def test_a_step_takes_little_memory_beside_the_state():
    """Delta and new state; where the state may be overwritten, delta and a few tiles."""
    rule, shape = adafactor_mlp(), (4000, 1000)
    th, p = rule.init(), drawn(shape, dtype=torch.float32)
    h = rule.init_hidden(th, p)
    size = 4 * p.numel()
    hidden = sum(x.numel() * x.element_size() for x in trees.leaves(h))
    assert peak(lambda: rule.update(th, p, p, h)) < size + hidden + 14e6
    assert peak(lambda: consuming_update(rule)(th, p, p, h)) < size + 14e6
    assert 4 * size < hidden < 4.1 * size


# -- derivatives and transforms ----------------------------------------------------------------

TREE = {"w": (3, 4), "conv": (2, 3, 3, 3), "b": (3,), "s": (), "none": (0, 3), "empty": (0,)}


@ARGUMENTS
def test_meta_gradients_are_finite_differences(arguments):
    """For the weights and for the decays of every kind, through several steps."""
    rule = adafactor_mlp(**LOUD, **arguments)
    th = weights(rule)
    start, target = ({k: drawn(s, i) for k, s in TREE.items()} for i in (0, 1))

    def meta(th):
        loss = lambda p, t: sum(((p[k] - t[k]) ** 2).sum() for k in p)
        batches = {k: torch.stack([x, x + 0.1, x - 0.2]) for k, x in target.items()}
        return fmeta.unroll(rule, loss, th, start, batches).losses.sum()

    gradient, e = grad(meta)(th), 1e-6
    for k, x in th.items():
        along = drawn(x.shape, 7)
        up, down = (meta({**th, k: x + s * along}) for s in (e, -e))
        got = (gradient[k] * along).sum()
        assert got.abs() > 1e-4, k
        torch.testing.assert_close(got, (up - down) / (2 * e), rtol=1e-5, atol=1e-7, msg=k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_give_finite_derivatives_of_second_order(dtype):
    rule = adafactor_mlp(**LOUD)
    th = weights(rule, dtype)
    p = {k: torch.zeros(s, dtype=dtype) for k, s in TREE.items()}

    def meta(th, p):
        q, h = rule.step(th, p, p, rule.init_hidden(th, p))
        q, h = rule.step(th, q, p, h)
        return sum((x + 1).square().sum() for x in q.values())

    first = lambda th: sum(x.square().sum() for x in grad(meta)(th, p).values())
    for x in trees.leaves((grad(meta, argnums=(0, 1))(th, p), grad(first)(th))):
        assert x.isfinite().all()


def test_a_transform_never_meets_the_tiles():
    """With tiny tiles derivatives, batches and traces are those of the plain form."""
    rules = [adafactor_mlp(**LOUD, chunk_size=n) for n in (4, None)]
    th = weights(rules[0])
    p, g, v = (drawn((4, 5), i) for i in range(3))

    def of(rule):
        return lambda p, g: rule.step(th, p, g * p, rule.init_hidden(th, p))[0]

    tiled, whole = map(of, rules)
    close(grad(lambda p: tiled(p, g).sum())(p), grad(lambda p: whole(p, g).sum())(p))
    close(jvp(tiled, (p, g), (v, v)), jvp(whole, (p, g), (v, v)))
    stacked = torch.stack([g, v])
    close(vmap(tiled, (None, 0))(p, stacked), torch.stack([whole(p, x) for x in stacked]))
    close(make_fx(tiled)(p, g)(v, g), whole(v, g))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p, v)
        tangent = torch.autograd.forward_ad.unpack_dual(tiled(dual, g)).tangent
    close(tangent, jvp(lambda p: whole(p, g), (p,), (v,))[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_odd_leaves_on_meta_and_in_other_dtypes(dtype):
    rule = adafactor_mlp(chunk_size=4)
    th, p = rule.init(), {k: drawn(s).to(dtype) for k, s in TREE.items()}
    h = rule.init_hidden(th, p)
    found = rule.step(th, p, p, h)
    assert all(x.isfinite().all() for x in trees.leaves(found))
    on_meta = rule.step(*trees.map(lambda x: x.to("meta"), (th, p, p, h)))
    for got, want in zip(trees.leaves(on_meta), trees.leaves(found), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


# -- what it learns, arguments -----------------------------------------------------------------


def test_decays_start_as_the_arguments_say():
    """After one step from zero, a moment is one minus the decay times what it is of."""
    rule = adafactor_mlp(**OTHER)
    p = torch.ones(4, 3)
    _, h = rule.step(rule.init(), p, 2 * p, rule.init_hidden(rule.init(), p))
    found = {k: x.flatten()[0].item() for k, x in h.leaves.items() if k[0] in "mr" and k != "row"}
    want = {"m0": 0.2, "m1": 0.1, "rms0": 0.4, "rms1": 0.04}
    assert found == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(h.leaves["row"], torch.tensor([0.8, 0.04]).expand(3, 2))
    assert h.leaves["col"].shape == (4, 2)


def test_weights_of_another_hidden_size_work():
    wide = adafactor_mlp(hidden_size=8, hidden_layers=3).init()
    rule, p = adafactor_mlp(), torch.ones(3, 2)
    delta, _ = rule.update(wide, p, p, rule.init_hidden(wide, p))
    assert delta.isfinite().all()
    assert delta.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be"),
        ({"hidden_layers": 1.5}, "hidden_layers must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"exp_mult": -1.0}, "exp_mult must be not negative"),
        ({"step_mult": math.nan}, "step_mult must be not negative"),
        ({"initial_rms_decays": (1.0,)}, "initial_rms_decays must be in"),
        ({"initial_momentum_decays": (0.9,)}, "as many initial_adafactor_decays as"),
    ],
)
def test_senseless_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        adafactor_mlp(**arguments)


def test_weights_of_another_rule_are_refused_by_name():
    rule, p = adafactor_mlp(), torch.ones(3)
    state = rule.init_hidden(rule.init(), p)
    with pytest.raises(ValueError, match=r"it learns .*momentum_decays"):
        rule.step(fmeta.optimizers.mlp().init(), p, p, state)


@pytest.mark.parametrize("consuming", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_state_of_kernels_lies_as_tiles_go_over_it_and_survives_other_memory(count, consuming):
    rule = adafactor_mlp(step_mult=0.1, chunk_size=500)
    th = rule.init(torch.Generator().manual_seed(0))
    params = {str(i): torch.randn(12, 16, 3, 3, dtype=torch.float64) for i in range(count)}
    update = consuming_update(rule) if consuming else rule.update
    hidden = rule.init_hidden(th, params)
    assert hidden.leaves["0"]["m0"].stride(1) == 1
    packed = trees.map(lambda x: x.clone(memory_format=torch.contiguous_format), hidden)
    for _ in range(3):
        want, hidden = update(th, params, params, hidden)
        found, packed = update(th, params, params, packed)
        torch.testing.assert_close((found, packed), (want, hidden), rtol=1e-12, atol=1e-12)
    assert packed.leaves["0"]["m0"].stride(1) == 1  # and lies so from the first step on
