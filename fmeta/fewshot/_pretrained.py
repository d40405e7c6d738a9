"""The baseline of the sinusoid figure: a network trained on all tasks together, then fine-tuned."""

from __future__ import annotations

from typing import Any

from fmeta import meta_train
from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._estimator import estimator
from fmeta.fewshot._evaluate import evaluate
from fmeta.fewshot._gradient_based import gradient_based
from fmeta.fewshot._losses import Loss
from fmeta.fewshot._reptile import reptile
from fmeta.fewshot._source import Source
from fmeta.optimizer import Optimizer
from fmeta.optimizers import sgd

__all__ = ["RATES", "fine_tuned", "pretrained"]

Tree = Any

RATES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def pretrained(
    network: Any,
    source: Source,
    *,
    loss: str | Loss,
    outer: Optimizer,
    num_tasks: int,
    num_steps: int,
    seed: int,
    start: Tree,
) -> Tree:
    """Parameters that minimise the mean loss over the examples of all tasks, as if they were one.

    Args:
        network, loss: as of `gradient_based`.
        source: of the tasks.
        outer: the optimizer.
        num_tasks: tasks of a step.
        num_steps: of training.
        seed: of the episodes, which are those that `fmeta.meta_train.run` shows other learners.
        start: ``model_params`` to start from.

    Returns:
        Meta-parameters for learners by gradient descent.
    """
    # Reptile with one step is this: its meta-gradient is that of the loss at the start.
    joint = reptile(network, lr=1.0, num_steps=1, loss=loss)
    meta_params = {**joint.init(), "model_params": start}
    trained = meta_train.run(
        estimator(joint, source, num_tasks=num_tasks),
        meta_params,
        outer=outer,
        num_steps=num_steps,
        seed=seed,
    )
    return trained.meta_params


def fine_tuned(
    network: Any,
    meta_params: Tree,
    source: Source,
    *,
    num_steps: int,
    loss: str | Loss,
    num_episodes: int,
    seed: int,
    split: str = "validation",
) -> tuple[MetaLearner, float]:
    """Gradient descent on the support set, at the rate that is best for this number of steps.

    Args:
        network, loss: as of `gradient_based`.
        meta_params: of `pretrained`.
        source: of the episodes that the rate is tuned on.
        num_steps: of gradient descent.
        num_episodes, seed, split: as of `evaluate`.

    Returns:
        ``(learner, rate)``; the rate is one of ``RATES``, 0 where no step helps.

    Reference:
        Finn, Abbeel, Levine (1703.03400), section 5.1: "pretraining on all of the tasks ... and
        then at test-time, fine-tuning with gradient descent on the K provided points, using an
        automatically tuned step size".
    """
    learners = {
        rate: gradient_based(network, sgd(rate), num_steps=num_steps, loss=loss) for rate in RATES
    }

    def loss_at(rate: float) -> float:
        scores = evaluate(
            learners[rate],
            meta_params,
            source,
            num_episodes=num_episodes,
            seed=seed,
            split=split,
            loss=loss,
        )
        mean = scores.loss()[0]
        return mean if mean == mean else float("inf")  # it may diverge

    best = min(RATES, key=loss_at)
    return learners[best], best
