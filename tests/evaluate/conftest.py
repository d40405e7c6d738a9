"""Families that train in microseconds; one of them has tasks that diverge."""

import pytest
import torch

from fmeta.tasks import TaskFamily

DOUBLE = {"dtype": torch.float64}


@pytest.fixture(scope="session")
def quadratics():
    """Noisy pull towards 0, on the test split towards 1; its metric is the distance from 0."""
    return TaskFamily(
        torch.tensor(1.0, **DOUBLE),
        lambda generator: {},
        lambda config, generator: {"w": torch.randn(3, generator=generator, **DOUBLE)},
        lambda config, generator, steps, split="train": (
            0.1 * torch.randn(steps, 3, generator=generator, **DOUBLE) + (split == "test")
        ),
        lambda data, config, p, b: (p["w"] - b).square().sum(),
        lambda data, config, p, b: {"distance": p["w"].norm()},
    )


@pytest.fixture(scope="session")
def cliffs(quadratics):
    """Of about half the tasks the loss is so steep that any step overflows it."""
    return quadratics._replace(
        sample=lambda generator: {"scale": 1e200 ** torch.randint(2, (), generator=generator)},
        loss=lambda data, config, p, b: config["scale"] * (p["w"] - b).square().sum(),
    )
