"""The one contract of all few-shot learners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fmeta.estimators import Estimate

__all__ = ["Episode", "Examples", "MetaLearner", "check_examples"]


class Examples(NamedTuple):
    """Inputs and what is known of them.

    Attributes:
        x: ``(n, ...)``.
        y: labels ``(n,)``, integers from 0 to ``ways`` - 1, or targets ``(n, outputs)``.
    """

    x: Tensor
    y: Tensor


class Episode(NamedTuple):
    """One task: examples to learn it from, and others that show whether it was learned.

    Stacked along a new leading dimension (`fmeta.tasks.stack_tasks`) episodes are a meta-batch.

    Attributes:
        support: what a learner adapts to.
        query: what it then has to predict.
        classes: which of the classes of its split the labels stand for, integers ``(ways,)``;
            ``()`` where there are none.
    """

    support: Examples
    query: Examples
    classes: Any = ()


class MetaLearner(NamedTuple):
    """Learns from episodes how to learn from a support set, as four pure functions.

    Attributes:
        init: ``init(generator=None) -> meta_params``; an ``nn.Module`` starts from the weights it
            has, whatever the generator.
        estimate: ``estimate(meta_params, episodes, progress=1.0, *, share=None) -> Estimate``, of a
            meta-batch; ``progress`` is the part of meta-training that is over, for learners whose
            meta-loss changes on the way, and ``share`` says which of the meta-batch these episodes
            are, where several processes have a part each (`estimator` does that). Metrics are
            those of `fmeta.estimators.Estimate` that concern one estimate, and of classifiers
            ``"accuracy"`` ``(tasks,)``.
        adapt: ``adapt(meta_params, support, *, num_steps=None) -> adapted``, of one task, for
            ``vmap``; ``num_steps`` other than that of meta-training is for learners that take
            steps, and refused by others.
        predict: ``predict(adapted, query_x) -> outputs``, ``(n, ways)`` or ``(n, outputs)``.

    ``adapt`` and ``predict`` record no graph of their own accord: they are functions to be
    transformed by ``torch.func`` or differentiated, and `fmeta.fewshot.evaluate` does neither. An
    estimate is a constant in reverse mode, for ``grads`` is the gradient of ``loss``; it can be
    transformed by `torch.func.vmap`, and its loss by `torch.func.jvp`.
    """

    init: Callable[..., Any]
    estimate: Callable[..., Estimate]
    adapt: Callable[..., Any]
    predict: Callable[..., Tensor]


def check_examples(examples: Any, what: str) -> Examples:
    """``examples`` as a pair, or an error that says what it is instead."""
    if not isinstance(examples, tuple) or len(examples) != 2:
        raise TypeError(f"{what} must be a pair (x, y), got a {type(examples).__name__}")
    x, y = examples
    for name, t in (("x", x), ("y", y)):
        if not isinstance(t, Tensor) or t.ndim < 1:
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} of {what} must be a tensor of examples, got {got}")
    if len(x) != len(y):
        raise ValueError(f"{what} has {len(x)} inputs x and {len(y)} labels y: one for each")
    if not len(x):
        raise ValueError(f"{what} is empty: give at least one example")
    return Examples(x, y)
