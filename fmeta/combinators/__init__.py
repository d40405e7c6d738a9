"""Optimizers made of optimizers: all act on `update`, all return an ordinary `Optimizer`."""

from fmeta.combinators._chain import chain
from fmeta.combinators._clip import clip_by_global_norm
from fmeta.combinators._partition import masked, partition
from fmeta.combinators._precision import hidden_dtype, master_weights
from fmeta.combinators._scheduled import scheduled
from fmeta.combinators._transform import Transform, to_transform
from fmeta.combinators._weight_decay import with_weight_decay

__all__ = [
    "Transform",
    "chain",
    "clip_by_global_norm",
    "hidden_dtype",
    "masked",
    "master_weights",
    "partition",
    "scheduled",
    "to_transform",
    "with_weight_decay",
]
