"""mlp: tiles, stacks and reused memory equal the plain form; derivatives, wrong arguments."""

import pytest
import torch
from torch.func import grad, vmap

import fmeta
from fmeta import trees
from fmeta._leafwise import consuming_update
from fmeta.optimizers import mlp
from fmeta.optimizers._common import one_minus
from fmeta.random import fold_in

LOUD = {"hidden_size": 6, "exp_mult": 0.1, "step_mult": 0.1}
SHAPES = [(), (1,), (7,), (5, 3), (1, 7), (3, 2, 4), (4, 3, 3, 3)]


def drawn(shape, *key):
    return torch.randn(shape, generator=fold_in(3, *key, *shape), dtype=torch.float64)


def weights(rule):
    """A start of the rule, but for biases, which keep dead units off a ReLU's kink."""
    th = trees.cast(rule.init(fold_in(1)), torch.float64)
    return {k: x if k[0] == "w" else x + 0.03 * drawn(x.shape) for k, x in th.items()}


def run(rule, th, start, grads, update=None):
    """Parameters and state after some steps."""
    p, h = start, rule.init_hidden(th, start)
    for g in grads:
        delta, h = (update or rule.update)(th, p, g, h)
        p = fmeta.apply_updates(p, delta)
    return p, h


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk_size", [1, 7, 40, None])
@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
def test_tiles_give_the_plain_result_to_rounding(chunk_size, hidden_layers):
    rule = mlp(**LOUD, hidden_layers=hidden_layers, chunk_size=chunk_size)
    th = weights(rule)
    start = {str(s): drawn(s) for s in SHAPES}
    grads = [{k: drawn(p.shape, i) for k, p in start.items()} for i in range(3)]
    observed = {k: x.clone().requires_grad_() for k, x in th.items()}  # records: the plain form
    plain = run(rule, observed, start, grads)
    assert trees.leaves(plain)[0].requires_grad
    close(run(rule, th, start, grads), trees.map(torch.Tensor.detach, plain))


@pytest.mark.parametrize("form", ["update", "consuming"])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3)], ids=str)
def test_a_stack_of_leaves_equals_each_alone(shape, form):
    rule = mlp(**LOUD, chunk_size=9)
    th = weights(rule)
    start = {str(i): (1 + i) * drawn(shape, i) for i in range(5)}
    grads = [{k: drawn(shape, i, int(k)) for k in start} for i in range(4)]
    p, h = run(rule, th, start, grads, consuming_update(rule) if form == "consuming" else None)
    for k in start:
        q, state = run(rule, th, start[k], [g[k] for g in grads])
        close((p[k], h.leaves[k]), (q, state.leaves))


def test_time_is_seen_for_each_leaf_by_its_own_count():
    """A leaf that was without gradient has made fewer steps."""
    rule = mlp(**LOUD)
    th = weights(rule)
    p = {k: drawn((2, 3)) for k in "ab"}
    h = rule.init_hidden(th, p)
    _, h = rule.step(th, p, {"a": p["a"], "b": None}, h)
    zero = rule.init_hidden(th, p).leaves
    h = h._replace(leaves={k: {**zero[k], "count": h.leaves[k]["count"]} for k in p})
    new, h = rule.step(th, p, p, h)
    assert [int(h.leaves[k]["count"]) for k in "ab"] == [2, 1]
    assert not torch.allclose(new["a"], new["b"])


def test_meta_gradient_is_the_finite_difference():
    rule = mlp(**LOUD)
    th, e = weights(rule), 1e-6
    start = {str(s): drawn(s) for s in SHAPES}
    along = {k: drawn(x.shape, 5) for k, x in th.items()}

    def meta(th):
        p, h = start, rule.init_hidden(th, start)
        for _ in range(3):
            p, h = rule.step(th, p, p, h)
        return sum(x.square().sum() for x in p.values())

    gradient = grad(meta)(th)
    got = sum((gradient[k] * along[k]).sum() for k in th)
    up, down = (meta({k: x + s * along[k] for k, x in th.items()}) for s in (e, -e))
    torch.testing.assert_close(got, (up - down) / (2 * e), rtol=1e-5, atol=1e-8)


def test_zero_gradients_give_finite_derivatives():
    rule = mlp()
    th, p = weights(rule), {str(s): torch.zeros(s, dtype=torch.float64) for s in SHAPES}

    def meta(th, p):
        q, h = rule.step(th, p, p, rule.init_hidden(th, p))
        q, h = rule.step(th, q, p, h)
        return sum((x + 1).square().sum() for x in q.values())

    for x in trees.leaves(grad(meta, argnums=(0, 1))(th, p)):
        assert x.isfinite().all()


def test_a_batch_equals_a_loop_with_tiny_tiles():
    rule = mlp(**LOUD, chunk_size=2)
    th, p = weights(rule), drawn((4, 5))
    f = lambda p, g: rule.step(th, p, g, rule.init_hidden(th, p))[0]
    grads = torch.stack([drawn((4, 5), i) for i in range(3)])
    close(vmap(f, (None, 0))(p, grads), torch.stack([f(p, g) for g in grads]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be"),
        ({"hidden_layers": True}, "hidden_layers must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"step_mult": -1.0}, "step_mult must be not negative"),
    ],
)
def test_senseless_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mlp(**arguments)


def test_weights_of_the_averages_are_those_of_float32():
    for decay in (0.0, 0.1, 0.3, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999, 1.0):
        assert one_minus(decay) == float(1 - torch.tensor(decay))
