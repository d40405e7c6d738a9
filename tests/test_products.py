"""Products that are read transposed are made transposed, with the same results."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fmeta._products import turn_products
from fmeta._trace import Traced


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def turned(fn, *args):
    """Names of the operations afterwards; the results must be those of before."""
    module = make_fx(fn)(*args)
    turn_products(module)
    torch.testing.assert_close(module(*args), fn(*args), rtol=1e-12, atol=1e-12)
    return [n.target.__name__ for n in module.graph.nodes if n.op == "call_function"]


A, B, C = draw(3, 4, 5), draw(3, 5, 6, seed=1), draw(3, 6, 4, seed=2)


def test_a_product_is_turned():
    names = turned(lambda a, b: torch.bmm(b.mT, a.mT).mT + 1, A, B)
    assert names == ["bmm.default", "add.Tensor"]


def test_one_of_matrices_too():
    names = turned(lambda a, b: torch.mm(b.t(), a.t()).t() + 1, A[0], B[0])
    assert names == ["mm.default", "add.Tensor"]


def test_sums_are_turned_with_what_they_sum():
    def fn(a, b, c):
        return (torch.bmm(a, b).mT + c).mT * 2

    assert turned(fn, A, B, C) == ["bmm.default", "transpose.int", "add.Tensor", "mul.Tensor"]

    def deep(a, b, c):
        total = torch.bmm(b.mT, a.mT)
        for _ in range(3):
            total = total + torch.bmm(b.mT, a.mT)
        return total.mT + c.mT

    assert turned(deep, A, B, C).count("transpose.int") == 1


def test_what_is_read_both_ways_is_left():
    def both(a, b):
        found = torch.bmm(a, b)
        return found, found.mT + 1

    assert turned(both, A, B) == ["bmm.default", "transpose.int", "add.Tensor"]


@pytest.mark.parametrize("scaled", [False, True])
def test_other_sums_are_left(scaled):
    """Of a row to each, of a number, and of a multiple."""

    def fn(a, row):
        total = torch.add(a, a, alpha=3) if scaled else a + row
        return total.mT.contiguous() + 1, (a + 2).mT.contiguous()

    assert turned(fn, A, draw(5, seed=3)).count("transpose.int") == 2


def test_the_second_derivative_of_a_layer_has_fewer_transposes():
    w, x = draw(3, 6, 4, seed=1), draw(3, 5, 4, seed=2)

    def meta_gradient(w, x):
        def stepped(w):
            first = torch.func.grad(lambda w: torch.bmm(x, w.mT).tanh().sum())(w)
            return torch.bmm(w - first, x.mT).sin().sum()

        return torch.func.grad(stepped)(w)

    plain = make_fx(meta_gradient)(w, x)
    before = [n.target for n in plain.graph.nodes].count(torch.ops.aten.transpose.int)
    assert turned(meta_gradient, w, x).count("transpose.int") < before


@pytest.mark.slow
def test_what_is_compiled_is_turned_and_right():
    call = Traced(lambda a, b, c: torch.bmm(a, b).mT + c.tanh(), compile=True, turned=True)
    c = draw(3, 6, 4, seed=5)
    torch.testing.assert_close(call(A, B, c), torch.bmm(A, B).mT + c.tanh())
