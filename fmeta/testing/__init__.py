"""Laws of optimizers, task families and estimators, and strategies to look for what breaks them.

`check_optimizer` runs all laws on an optimizer, fmeta's or your own. Each law can be called by
itself as ``law(optimizer, params, **setup)`` and raises an AssertionError that names what is wrong,
where, and the cure. ``**setup`` is the same for all: ``opt_params`` (default: ``optimizer.init``),
``extras`` (what the rule needs, for one step: a dict or a function of the parameters),
``num_steps`` (the horizon) and ``seed``.

`check_family` does the same for a `fmeta.tasks.TaskFamily`, by the laws in `FAMILY_LAWS`, and
`check_estimator` for a `fmeta.estimators.Estimator`, by those in `ESTIMATOR_LAWS`.

The strategies (`param_trees`, `gradients`, `step_counts`, `shapes`) need hypothesis, which comes
with ``pip install 'fmeta[test]'``; the laws do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmeta.testing._activity import activations_beside
from fmeta.testing._case import built_in_trees
from fmeta.testing._check import Report, check_optimizer
from fmeta.testing._check_estimator import ESTIMATOR_LAWS, check_estimator
from fmeta.testing._check_family import FAMILY_LAWS, check_family
from fmeta.testing._laws_compile import compiles_once, make_fx_traces, runs_on_meta
from fmeta.testing._laws_gradient import (
    checkpoint_changes_nothing,
    first_order_values_equal,
    meta_gradients_exact,
    zero_gradients_finite,
)
from fmeta.testing._laws_step import (
    delta_added_once,
    deterministic,
    inputs_unchanged,
    key_order_irrelevant,
    kinds_kept,
    needs_enforced,
    none_gradients_skip,
)
from fmeta.testing._laws_symmetry import permutation_equivariant, vmap_equals_loop
from fmeta.testing._registry import LAWS, Law

if TYPE_CHECKING:
    from fmeta.testing._strategies import gradients, param_trees, shapes, step_counts

__all__ = [
    "ESTIMATOR_LAWS",
    "FAMILY_LAWS",
    "LAWS",
    "Law",
    "Report",
    "activations_beside",
    "built_in_trees",
    "check_estimator",
    "check_family",
    "check_optimizer",
    "checkpoint_changes_nothing",
    "compiles_once",
    "delta_added_once",
    "deterministic",
    "first_order_values_equal",
    "gradients",
    "inputs_unchanged",
    "key_order_irrelevant",
    "kinds_kept",
    "make_fx_traces",
    "meta_gradients_exact",
    "needs_enforced",
    "none_gradients_skip",
    "param_trees",
    "permutation_equivariant",
    "runs_on_meta",
    "shapes",
    "step_counts",
    "vmap_equals_loop",
    "zero_gradients_finite",
]

_STRATEGIES = {"gradients", "param_trees", "shapes", "step_counts"}


def __getattr__(name: str) -> Any:
    if name in _STRATEGIES:
        from fmeta.testing import _strategies

        return getattr(_strategies, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
