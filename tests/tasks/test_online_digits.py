"""Freshly transformed digits: the bank of versions is what its description says."""

import math

import torch

from fmeta.random import fold_in
from fmeta.tasks import _digits_data as data
from fmeta.tasks import digits


def test_rotations_and_shifts_fill_their_limits(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "moved", lambda x, *by: seen.append((x, *by)) or x)
    data.online_images.__wrapped__()
    ((x, angle, left, up),) = seen
    for found, limit in ((angle, math.radians(20)), (left, 1.0), (up, 1.0)):
        assert found.shape == (1797 * data.VERSIONS,)
        assert 0.999 * limit < found.max() <= 1.0001 * limit
        assert -1.0001 * limit <= found.min() < -0.999 * limit
        assert found.mean().abs() < 0.01 * limit
    versions = x.view(1797, data.VERSIONS, 64)
    assert torch.equal(versions, data._load()[0][:, None].expand_as(versions))


def test_shifts_come_before_the_turn():
    x, zero = torch.rand(1, 64, generator=fold_in(0)), torch.zeros(1)
    shifted = data.moved(x, zero, zero + 1, zero)
    want = torch.rot90(shifted.view(8, 8)).reshape(1, 64)
    got = data.moved(x, zero + math.pi / 2, zero + 1, zero)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_last_place_in_the_bank_has_noise_for_a_whole_image():
    family = digits((5,), online=True)
    last = torch.tensor([[1797 * data.VERSIONS - 1, 2**16 - 1]])
    noisy = family.loss(family.data, {}, family.init({}, fold_in(0)), last)
    assert noisy.isfinite()
    places = family.batches({}, fold_in(0), 600)[..., 1]
    assert places.min() >= 0
    assert places.max() < 2**16
    assert len(family.data["noise"]) == 2**16 + 63
