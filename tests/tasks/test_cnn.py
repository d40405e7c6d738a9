"""Patches of the CNN, as they are made with a compiler and without."""

import pytest
import torch
from torch.nn import functional as F

from fmeta._trace import compiling
from fmeta.tasks._cnn import _conv, _corners, _windows


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8])
def test_both_ways_to_make_patches_are_torchs_convolution(side):
    generator = torch.Generator().manual_seed(side)
    x, kernel, u = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, side, side, 3), (4, 5, 3, 3), (4, (side + 1) // 2, (side + 1) // 2, 3))
    )
    want = F.conv2d(x.permute(3, 0, 1, 2), kernel, stride=2, padding=1).permute(1, 2, 3, 0)
    found, gradients = [want, _conv(x, kernel)], []
    with compiling(True):
        found.append(_conv(x, kernel))
    for y in found:
        torch.testing.assert_close(y, want)
        first = torch.autograd.grad((y * u).sum(), (x, kernel), create_graph=True)
        gradients.append((*first, *torch.autograd.grad((first[0] * x).sum(), (u, kernel))))
    for got in gradients[1:]:
        torch.testing.assert_close(got, gradients[0])
    assert torch.equal(_windows(_windows(x, 1, 1), 3, 2), _corners(x).unflatten(1, (3, 3)))
