"""The network as one operation: what it computes, and that the compiler computes the same."""

import pytest
import torch

from fmeta.optimizers._fused import recorded
from fmeta.optimizers._network_op import network
from fmeta.random import fold_in

UNITS = (6, 5)  # one block of units and a part of one
SHAPES = [(3, 7, 5, 20), (3, 6, 7, 5), (3, 6, 5, 20), (3, 6, 2), (5, 6), (5,), (2, 5), (2,)]


def drawn(dtype=torch.float64, by=1):
    shapes = [SHAPES[0], SHAPES[0], *SHAPES[1:]]
    sizes = {3: 3, 7: 7 * by, 5: 5, 20: 20 * by}
    return [
        torch.randn([sizes.get(n, n) if len(s) == 4 else n for n in s], generator=fold_in(9, i)).to(
            dtype
        )
        for i, s in enumerate(shapes)
    ]


def of_two_features(*x):
    return [network([x[0], x[0] * x[1]], list(x[2:4]), list(x[4:]), UNITS)]


def test_it_is_the_network_of_each_coordinate():
    x = drawn()
    (found,), w = of_two_features(*x), x[4:]
    every = torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist()
    for b, o, k, i in every[::41]:
        p, g = x[0][b, o, k, i], x[1][b, o, k, i]
        y = x[2][b, :, o, k] + x[3][b, :, k, i] + w[0][b] @ torch.stack([p, p * g])
        for a, c in zip(w[1::2], w[2::2], strict=True):
            y = a @ y.relu() + c
        torch.testing.assert_close(found[b, o, k, i], y[0] * y[1].exp())


@pytest.mark.slow
def test_compiled_it_is_the_same_for_all_sizes():
    run = recorded(of_two_features, example, torch.device("cpu"), torch.float64)
    for by in (1, 2):
        x = drawn(by=by)
        torch.testing.assert_close(run(*x)[0], of_two_features(*x)[0])


def example(device, dtype):
    return [x.to(device) for x in drawn(dtype)]
