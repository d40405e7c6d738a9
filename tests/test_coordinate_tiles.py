"""Coordinates a tile at a time: what all at once give, in the state's memory where it may be."""

import pytest
import torch

import fmeta
from fmeta import _coordinate_tiles, trees
from fmeta._leafwise import consuming_update
from fmeta.optimizers import lstm
from fmeta.random import fold_in

SHAPES = [(7, 3), (), (5,), (0, 2), (2, 3, 4)]


class Swapping:
    """Two numbers a coordinate, which change places at every step."""

    def init(self, generator=None):
        return {"rate": torch.tensor(0.1)}

    def init_hidden(self, th, p):
        return {"a": p.clone(), "b": 2 * p}

    def update(self, th, p, g, h):
        return th["rate"] * h["a"] + g, {"a": h["b"], "b": h["a"]}


class Growing(Swapping):
    """Its state has one more entry after the first step."""

    def update(self, th, p, g, h):
        return th["rate"] * g, {**h, "c": g}


def drawn(*key):
    shapes = {str(i): s for i, s in enumerate(SHAPES)}
    return {k: torch.randn(s, generator=fold_in(5, *key, int(k))) for k, s in shapes.items()}


def steps(rule, update, th, count=3):
    params, deltas = drawn(0), []
    hidden = rule.init_hidden(th, params)
    for i in range(count):
        delta, hidden = update(th, params, drawn(1 + i), hidden)
        deltas.append(trees.map(torch.clone, delta))
    return deltas, hidden


RULES = {
    "lstm": lambda: lstm(4, 2),
    "lstm in chunks": lambda: lstm(4, 2, chunk_size=3),
    "swapping": lambda: fmeta.coordinatewise(Swapping()),
    "growing": lambda: fmeta.coordinatewise(Growing()),
}


@pytest.mark.parametrize("size", [1, 5, 16, 30])
@pytest.mark.parametrize("consumes", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_tiles_give_what_all_coordinates_give_at_once(name, consumes, size, monkeypatch):
    rule = RULES[name]()
    th = rule.init(fold_in(2))
    want = steps(rule, rule.update, th)
    called = []
    one = _coordinate_tiles.in_tiles
    monkeypatch.setattr(_coordinate_tiles, "_IN_CACHE", 16 * size if "lstm" in name else 2 * size)
    monkeypatch.setattr(
        "fmeta._coordinatewise.in_tiles", lambda *a: called.append(a[-2]) or one(*a)
    )
    found = steps(rule, consuming_update(rule) if consumes else rule.update, th)
    assert called[0] == (min(size, 3) if "chunks" in name else size)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_only_a_consuming_step_writes_over_the_state(monkeypatch):
    monkeypatch.setattr(_coordinate_tiles, "_IN_CACHE", 16 * 4)
    rule = lstm(4, 2)
    th, params = rule.init(), drawn(0)
    hidden = rule.init_hidden(th, params)
    kept = trees.map(torch.clone, hidden)
    _, plain = rule.update(th, params, drawn(1), hidden)
    torch.testing.assert_close(hidden, kept, rtol=0, atol=0)
    _, new = consuming_update(rule)(th, params, drawn(1), hidden)
    torch.testing.assert_close(new, plain, rtol=0, atol=0)
    assert new.leaves["0"]["h"].data_ptr() == hidden.leaves["0"]["h"].data_ptr()


def test_derivatives_take_all_coordinates_at_once(monkeypatch):
    monkeypatch.setattr(_coordinate_tiles, "_IN_CACHE", 1)
    monkeypatch.setattr("fmeta._coordinatewise.in_tiles", None)
    rule = lstm(4, 2)
    th, params = rule.init(), drawn(0)
    hidden = rule.init_hidden(th, params)

    def loss(th):
        return sum(x.square().sum() for x in rule.update(th, params, drawn(1), hidden)[0].values())

    by_func = torch.func.grad(loss)(th)
    leaves = trees.map(lambda x: x.clone().requires_grad_(), th)
    loss(leaves).backward()
    for k, x in leaves.items():
        torch.testing.assert_close(x.grad, by_func[k])


def test_memory_of_a_step_is_that_of_a_tile():
    from torch.profiler import ProfilerActivity, profile

    rule = lstm(4, 1)
    th, params = rule.init(), {"w": torch.ones(400, 500)}
    hidden = rule.init_hidden(th, params)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        consuming_update(rule)(th, params, params, hidden)
    largest = max(e.cpu_memory_usage for e in found.events())
    assert largest <= max(4 * params["w"].numel(), 4 * 4 * 2 * _coordinate_tiles._IN_CACHE)


class Counting(Swapping):
    """Its count is an integer at first, and a float from the first step on."""

    def init_hidden(self, th, p):
        return {"n": torch.zeros((), dtype=torch.int64)}

    def update(self, th, p, g, h):
        n = h["n"] + g
        return th["rate"] * n, {"n": n}


def test_a_leaf_whose_state_is_of_another_kind_does_not_make_others_go_twice(monkeypatch):
    rule, params = fmeta.coordinatewise(Counting()), {"a": torch.zeros(8), "b": torch.zeros(8)}
    grads = trees.map(torch.ones_like, params)

    def last_state(update):
        hidden = rule.init_hidden(rule.init(), params)
        _, hidden = update(rule.init(), params, {**grads, "b": None}, hidden)
        return update(rule.init(), params, grads, hidden)[1].leaves

    want = last_state(rule.update)
    assert want["a"]["n"].tolist() == [2.0] * 8
    monkeypatch.setattr(_coordinate_tiles, "_IN_CACHE", 4)
    assert torch.equal(last_state(consuming_update(rule))["a"]["n"], want["a"]["n"])
