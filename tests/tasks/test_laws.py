"""Every family that fmeta builds obeys the laws of families."""

import pytest

from fmeta.tasks import (
    augmented,
    digits,
    logistic_regression,
    quadratic,
    robust_regression,
    sinusoid,
    small_net,
)
from fmeta.testing import FAMILY_LAWS, check_family

FAMILIES = {
    "mlp": digits((5,), batch_size=8),
    "no hidden layer": digits((), batch_size=8, online=True),
    "mlp online": digits((5, 4), "tanh", batch_size=8, online=True),
    "cnn": digits((3, 4), batch_size=8, model="cnn"),
    "cnn online": digits((3,), "gelu", batch_size=8, model="cnn", online=True),
    "autoencoder": digits((6, 2), batch_size=8, model="autoencoder"),
    "autoencoder online": digits((6,), batch_size=8, model="autoencoder", online=True),
    "transformer": digits((4, 4), batch_size=8, model="transformer"),
    "transformer online": digits((6,), "gelu", batch_size=8, model="transformer", online=True),
    "quadratic": quadratic(4),
    "noisy quadratic": quadratic(3, condition=10.0, noise=0.5),
    "sinusoid": sinusoid(5, (6,)),
    "logistic regression": logistic_regression(points=20),
    "logistic regression in batches": logistic_regression(4, points=20, batch_size=5),
    "robust regression": robust_regression(points=20),
    "robust regression in batches": robust_regression(2, 21, clusters=3, batch_size=4),
    "small net": small_net(points=20),
    "small net in batches": small_net(3, 4, 3, points=30, clusters=5, batch_size=10),
}
EVERYTHING = {"rescale": 0.5, "loss_scale": 0.5, "gradient_noise": 0.1}
FAMILIES |= {
    f"augmented {name}": augmented(
        FAMILIES[name], permute_labels=name in ("mlp online", "cnn"), **EVERYTHING
    )
    for name in ("mlp online", "cnn", "autoencoder online", "quadratic")
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_obeys_the_laws(name):
    family = FAMILIES[name]
    report = check_family(family)
    missing = set() if family.metrics else {"metrics_are_scalars"}
    missing |= set() if family.extras else {"extras_are_tensors"}
    assert set(report.held) == set(FAMILY_LAWS) - missing
