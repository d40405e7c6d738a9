"""Names of tasks give the families that they say."""

import pytest
import torch

from fmeta.meta_train._digits_tasks import digits_by_name
from fmeta.tasks import digits


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mlp:8", ((8,), "relu", 4, "mlp", False)),
        ("mlp:8,6:tanh", ((8, 6), "tanh", 4, "mlp", False)),
        ("autoencoder:5", ((5,), "relu", 4, "autoencoder", False)),
    ],
)
def test_a_name_is_a_family(name, arguments):
    got, want = digits_by_name(name, batch_size=4, online=False), digits(*arguments)
    params = [f.init({}, torch.Generator().manual_seed(0)) for f in (got, want)]
    assert params[0].keys() == params[1].keys()
    batch = want.batches({}, torch.Generator().manual_seed(0), 1)[0]
    losses = [f.loss(f.data, {}, p, batch) for f, p in zip((got, want), params, strict=True)]
    assert losses[0] == losses[1]


def test_online_and_batch_size_are_passed_on():
    family = digits_by_name("mlp:4", batch_size=3, online=True)
    assert family.batches({}, torch.Generator(), 2).shape == (2, 3, 2)


@pytest.mark.parametrize("name", ["mlp", "mlp:", "mlp:a", "mlp:8:relu:x", "", ":8"])
def test_another_form_is_an_error(name):
    with pytest.raises(ValueError, match="task"):
        digits_by_name(name, batch_size=4, online=False)
