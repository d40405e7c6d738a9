"""Optimizers made of optimizers: all act on `update`, all return an ordinary `Optimizer`."""

from fmeta.combinators._accumulate import accumulate
from fmeta.combinators._average import averaged
from fmeta.combinators._chain import chain
from fmeta.combinators._chunked import chunked
from fmeta.combinators._clip import clip_by_global_norm, clip_by_value
from fmeta.combinators._finite import apply_if_finite
from fmeta.combinators._lookahead import lookahead
from fmeta.combinators._orthogonalize import orthogonalize
from fmeta.combinators._partition import masked, partition
from fmeta.combinators._precision import hidden_dtype, master_weights
from fmeta.combinators._scheduled import scheduled
from fmeta.combinators._transform import Transform, to_transform
from fmeta.combinators._weight_decay import with_weight_decay

__all__ = [
    "Transform",
    "accumulate",
    "apply_if_finite",
    "averaged",
    "chain",
    "chunked",
    "clip_by_global_norm",
    "clip_by_value",
    "hidden_dtype",
    "lookahead",
    "masked",
    "master_weights",
    "orthogonalize",
    "partition",
    "scheduled",
    "to_transform",
    "with_weight_decay",
]
