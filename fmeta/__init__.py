"""Functional learned optimizers and meta-learning on torch.

Training a model is a pure function of data: a scan of `step` over batches. Everything in fmeta is a
function of that shape or a transform of one, so whatever goes into training (the parameters of an
optimizer, the initial parameters of a model, or both) can be learned by differentiating through it.
"""

import importlib
from typing import Any

from fmeta import functional, optimizers, pretrained, random, schedules, trees
from fmeta._coordinatewise import coordinatewise
from fmeta._implicit import ImplicitGradient, implicit_gradient
from fmeta._inner_step import InnerState, inner_step
from fmeta._learn import learn
from fmeta._plan import MemoryPlan, PlannedUnroll, plan_memory
from fmeta._recomputed import recomputed
from fmeta._scan import scan
from fmeta._tensorwise import tensorwise
from fmeta._treewise import treewise
from fmeta._unroll import Run, unroll
from fmeta.combinators import (
    accumulate,
    apply_if_finite,
    averaged,
    chain,
    chunked,
    clip_by_global_norm,
    clip_by_value,
    hidden_dtype,
    lookahead,
    masked,
    master_weights,
    orthogonalize,
    partition,
    scheduled,
    to_transform,
    with_weight_decay,
)
from fmeta.functional import functionalize, loss_of
from fmeta.optimizer import Hidden, Optimizer, apply_updates, optimizer_from_step

__version__ = "0.1.0"

# Imported when first used: they bring along scikit-learn, plotting or the command line.
_LAZY = (
    "distributed",
    "estimators",
    "evaluate",
    "fewshot",
    "meta_train",
    "plot",
    "tasks",
    "testing",
    "torch_optim",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"fmeta.{name}")
    raise AttributeError(f"module 'fmeta' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "Hidden",
    "ImplicitGradient",
    "InnerState",
    "MemoryPlan",
    "Optimizer",
    "PlannedUnroll",
    "Run",
    "accumulate",
    "apply_if_finite",
    "apply_updates",
    "averaged",
    "chain",
    "chunked",
    "clip_by_global_norm",
    "clip_by_value",
    "coordinatewise",
    "functional",
    "functionalize",
    "hidden_dtype",
    "implicit_gradient",
    "inner_step",
    "learn",
    "lookahead",
    "loss_of",
    "masked",
    "master_weights",
    "optimizer_from_step",
    "optimizers",
    "orthogonalize",
    "partition",
    "plan_memory",
    "pretrained",
    "random",
    "recomputed",
    "scan",
    "scheduled",
    "schedules",
    "tensorwise",
    "to_transform",
    "trees",
    "treewise",
    "unroll",
    "with_weight_decay",
]
