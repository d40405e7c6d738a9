"""`check_optimizer`: all laws on an optimizer, with an account of what ran."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from fmeta.optimizer import Hidden
from fmeta.testing._case import Case, built_in_trees
from fmeta.testing._laws_symmetry import EQUIVARIANCES
from fmeta.testing._registry import LAWS

__all__ = ["Report", "check_optimizer"]

Tree = Any


class Report(NamedTuple):
    """What `check_optimizer` did.

    Attributes:
        held: for each law that was run, the names of the trees on which it holds.
        not_run: for each other law, why.
    """

    held: dict[str, tuple[str, ...]]
    not_run: dict[str, str]


def check_optimizer(
    optimizer: Any,
    *,
    equivariance: str | None = None,
    laws: Collection[str] | None = None,
    exclude: Collection[str] = (),
    param_trees: Mapping[str, Tree] | None = None,
    extras: Any = None,
    num_steps: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Report:
    """Checks that an optimizer obeys the laws that the rest of fmeta relies on.

    Every law in ``fmeta.testing.LAWS`` can also be called by itself, as
    ``law(optimizer, params, ...)``. It takes a few seconds, most of them in `torch.compile`
    (law ``compiles_once``).

    Args:
        optimizer: an `Optimizer` with any hidden state; or a function of the parameter tree that
            builds one, for rules made for one tree.
        equivariance: the symmetry it has: ``"coordinate"`` (all coordinates of a leaf are treated
            alike), ``"axes"`` (the indices along each axis are), or None: that law is not run.
        laws: names of the laws to run; default all.
        exclude: names of laws that it need not obey.
        param_trees: parameter trees by name, floating; default two built-in ones. Costly laws run
            on the first only.
        extras: what the rule needs beside loss and horizon, by name, for one step: a dict, or a
            function of the parameters that gives one, called at those of each step and in float64
            differentiated with them; for ``"activations"``, `fmeta.testing.activations_beside`.
        num_steps: the horizon given to ``init_hidden``.
        seed: of gradients, targets and ``opt_params``.
        device: of the built-in trees.

    Returns:
        A `Report`: which laws were run, on which trees, and why the others were not.

    Raises:
        AssertionError: the first law that does not hold, with its name, the tree, the path in it
            and a cure.
        ValueError: for an unknown name of a law or of an equivariance.

    Example:
        >>> import fmeta
        >>> report = check_optimizer(
        ...     fmeta.optimizers.sgd(0.1), equivariance="coordinate", laws=["inputs_unchanged"]
        ... )
        >>> report.held
        {'inputs_unchanged': ('small', 'nested')}
    """
    for name in (*(laws or ()), *exclude):
        if name not in LAWS:
            raise ValueError(f"there is no law {name!r}; there are {', '.join(LAWS)}")
    if equivariance is not None and equivariance not in EQUIVARIANCES:
        raise ValueError(
            f"equivariance must be None or one of {EQUIVARIANCES}, got {equivariance!r}"
        )
    built_in = param_trees is None
    if param_trees is None:
        param_trees = built_in_trees(device)
    if not param_trees:
        raise ValueError("param_trees is empty: give at least one tree of parameters")
    setup = {"extras": extras, "num_steps": num_steps, "seed": seed}
    held: dict[str, tuple[str, ...]] = {}
    not_run: dict[str, str] = {}
    first = Case(optimizer, next(iter(param_trees.values())), **setup)
    hidden = first.start(first.params)
    if built_in and not isinstance(hidden, Hidden):
        # Written by hand, it may be for the flat dicts that `functionalize` gives.
        param_trees = {"small": param_trees["small"]}
        not_run["tree 'nested'"] = (
            f"the hidden state is a {type(hidden).__name__}: the optimizer may be for flat dicts "
            "only; give param_trees=fmeta.testing.built_in_trees() to try every kind of node"
        )
    for name, law in sorted(LAWS.items(), key=_order):
        own: dict[str, Any] = dict(setup)
        if name == "permutation_equivariant":
            own["equivariance"] = equivariance
        if name in exclude:
            not_run[name] = "excluded"
        elif laws is not None and name not in laws:
            not_run[name] = "not among `laws`"
        elif law.needs_hidden and not isinstance(hidden, Hidden):
            not_run[name] = f"the hidden state is a {type(hidden).__name__}, not an fmeta.Hidden"
        elif "equivariance" in own and equivariance is None:
            not_run[name] = 'no equivariance was stated: give "coordinate" or "axes"'
        else:
            held[name] = _run(name, optimizer, param_trees, own)
    return Report(held, not_run)


# What breaks one of these breaks others too, with a message further from the cause.
_FIRST = ("inputs_unchanged", "deterministic", "kinds_kept")


def _order(item: tuple[str, Any]) -> tuple[int, bool]:
    name, law = item
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST), law.once)


def _run(
    name: str, optimizer: Any, param_trees: Mapping[str, Tree], setup: dict[str, Any]
) -> tuple[str, ...]:
    names = list(param_trees)
    if LAWS[name].once:
        names = names[:1]
    for tree in names:
        try:
            LAWS[name].check(optimizer, param_trees[tree], **setup)
        except AssertionError as error:
            raise AssertionError(f"{error} [parameter tree {tree!r}]") from error.__cause__
    return tuple(names)
