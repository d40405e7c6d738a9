"""What the processes of these tests do: each function gets its ranks and gives tensors by name."""

import torch

import fmeta
from fmeta import estimators, trees
from fmeta.tasks import TaskFamily, mixture

RULE = fmeta.learn(fmeta.optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=0.05)
META = trees.map(lambda x: x.double(), RULE.init())
DOUBLE = {"dtype": torch.float64}


def quadratics(dim, worst=1.2):
    """``k |w - b|^2 / 2``; tasks whose number k is above ``worst`` have no finite loss."""

    def loss(data, config, params, batch):
        value = config["k"] * (params["w"] - batch).square().sum() / 2
        return torch.where(config["k"] > worst, torch.nan, value)

    return TaskFamily(
        (),
        lambda generator: {"k": 0.5 + torch.rand((), generator=generator, **DOUBLE)},
        lambda config, generator: {"w": torch.randn(dim, generator=generator, **DOUBLE)},
        lambda config, generator, steps, split="train": torch.randn(
            steps, dim, generator=generator, **DOUBLE
        ),
        loss,
    )


QUADRATIC = quadratics(3)
MIXED = mixture([QUADRATIC, quadratics(5, worst=9.0)], weights=(2, 1))
OPTIONS = {"horizon": (4, 6), "truncation": 3}

ESTIMATORS = {
    "full": lambda **o: estimators.full(RULE, QUADRATIC, num_tasks=5, horizon=4, **o),
    "full of a mixture": lambda **o: estimators.full(RULE, MIXED, num_tasks=5, horizon=4, **o),
    "truncated": lambda **o: estimators.truncated(RULE, QUADRATIC, num_tasks=5, **OPTIONS, **o),
    "truncated, a mixture": lambda **o: estimators.truncated(
        RULE, MIXED, num_tasks=5, **OPTIONS, **o
    ),
    "pes": lambda **o: estimators.pes(RULE, QUADRATIC, num_tasks=5, **OPTIONS, **o),
    "pes, a mixture": lambda **o: estimators.pes(RULE, MIXED, num_tasks=5, **OPTIONS, **o),
    "pes, two tasks a particle": lambda **o: estimators.pes(
        RULE, QUADRATIC, num_tasks=6, num_particles=3, **OPTIONS, **o
    ),
    "pes, one copy": lambda **o: estimators.pes(
        RULE, QUADRATIC, num_tasks=5, antithetic=False, **OPTIONS, **o
    ),
}


def estimates(name, ranks, count=4):
    """Everything that some estimates one after the other give, and the whole state after them."""
    estimator = ESTIMATORS[name](ranks=ranks)
    state = estimator.init(META, 7)
    found = []
    for _ in range(count):
        # Through the form in which it is saved, as on resuming.
        estimate, state = estimator.estimate(META, state)
        found.append(estimate)
    return found, estimator.gather(state)


def all_estimates(ranks, folder):
    return {name: [x._asdict() for x in estimates(name, ranks)[0]] for name in ESTIMATORS}
