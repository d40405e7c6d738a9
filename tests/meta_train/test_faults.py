"""Faults of tasks: none reaches what is learned, and no outer step is lost.

``python -m pytest -n0 -s tests/meta_train/test_faults.py`` prints how many there were.
"""

import pytest
import torch

import fmeta
from fmeta import estimators, trees
from fmeta.meta_train import resume, run
from fmeta.tasks import TaskFamily

T = 4
BAD = 3  # a third of the tasks


def sample(generator):
    return {
        "target": torch.randn(3, generator=generator),
        "number": torch.randint(1000, (), generator=generator),
        "at": torch.randint(T, (), generator=generator),
    }


def family_with(fault):
    """Quadratics, of which every third becomes bad at a step of its own."""

    def batches(config, generator, steps, split="train"):
        return {"noise": torch.randn(steps, 3, generator=generator), "t": torch.arange(steps) % T}

    def loss(data, config, params, batch):
        value = (params["w"] - config["target"] + 0.1 * batch["noise"]).square().sum()
        hit = (config["number"] % BAD == 0) & (batch["t"] == config["at"])
        return fault(value, hit)

    init = lambda config, generator: {"w": torch.randn(3, generator=generator)}
    return TaskFamily((), sample, init, batches, loss)


FAULTS = {
    "a loss of nan": lambda value, hit: torch.where(hit, torch.nan, value),
    "a loss of inf": lambda value, hit: torch.where(hit, torch.inf, value),
    "a loss that overflows": lambda value, hit: value * torch.where(hit, 1e30, 1.0) ** 2,
    # Not a number where the square root is taken at 0.
    "a gradient of nan": lambda value, hit: (value * torch.where(hit, 0.0, 1.0)).sqrt().square(),
}
RULE = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.05)
OF_PIECES = {"horizon": T, "truncation": 2, "num_tasks": 9}
ESTIMATORS = {
    "full": lambda family: estimators.full(RULE, family, num_tasks=9, horizon=T),
    "truncated": lambda family: estimators.truncated(RULE, family, **OF_PIECES),
    **{
        name: lambda family, name=name: getattr(estimators, name)(
            RULE, family, std=0.1, **OF_PIECES
        )
        for name in ("pes", "es", "es_single", "nres")
    },
    "score_function": lambda family: estimators.score_function(
        RULE, family, num_tasks=9, horizon=T, std=0.1
    ),
}


def train(estimator, steps=6, **options):
    outer = fmeta.optimizers.adam(0.05)
    return run(estimator, RULE.init(), outer=outer, num_steps=steps, max_skipped=steps, **options)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_learned_stays_finite_and_only_bad_tasks_are_left_out(name, fault):
    estimator = ESTIMATORS[name](family_with(FAULTS[fault]))
    state, params = estimator.init(RULE.init(), 0), RULE.init()
    hits = 0
    for _ in range(6):
        found, state = estimator.estimate(params, state)
        left_out = found.metrics["diverged"]
        assert all(x.isfinite().all() for x in trees.leaves((found.loss, found.grads)))
        hits += int(left_out.sum())
        for drawn in found.metrics["drawn"][left_out].tolist():
            config = fmeta.tasks.sample_task(family_with(FAULTS[fault]), 1, *drawn).config
            assert config["number"] % BAD == 0, "a good task was left out"
    print(f"{name}, {fault}: {hits} of {6 * 9} left out")
    assert hits > 0
    result = train(ESTIMATORS[name](family_with(FAULTS[fault])))
    assert all(x.isfinite().all() for x in trees.leaves(result.meta_params))
    assert any((x != y).any() for x, y in zip(
        *map(trees.leaves, (result.meta_params, RULE.init())), strict=True))  # fmt: skip


def test_a_task_that_raises_is_named_and_the_steps_before_it_are_saved(tmp_path):
    sound = family_with(lambda value, hit: value)

    def broken(config, generator, steps, split="train"):
        if broken.on and config["number"] % 31 == 0:
            raise OSError("the data of this task cannot be read")
        return sound.batches(config, generator, steps, split)

    broken.on = True
    estimator = ESTIMATORS["full"](sound._replace(batches=broken))
    with pytest.raises(OSError, match="cannot be read") as caught:
        train(estimator, steps=20, checkpoint_folder=tmp_path, checkpoint_every=100)
    (note,) = caught.value.__notes__
    assert "the integers (0, " in note
    broken.on = False
    outer = fmeta.optimizers.adam(0.05)
    rest = resume(tmp_path, estimator, RULE.init(), outer=outer, num_steps=20, max_skipped=20,
                  checkpoint_every=100)  # fmt: skip
    assert 0 < len(rest.history) < 20, "nothing of what went before was saved"
    whole = train(ESTIMATORS["full"](sound), steps=20)
    for x, y in zip(*map(trees.leaves, (rest.meta_params, whole.meta_params)), strict=True):
        assert torch.equal(x, y)
