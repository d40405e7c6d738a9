"""`check_estimator`: laws of an estimator of the meta-gradient, which the outer loop relies on."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmeta import _files, trees
from fmeta.estimators import Estimate, Estimator
from fmeta.testing._check import Report
from fmeta.testing._compare import (
    assert_close,
    assert_same_kinds,
    assert_same_tensors,
    leaf_names,
    remembered,
    short,
)
from fmeta.testing._laws_step import _changed, _global_states
from fmeta.testing._registry import of_law

__all__ = ["ESTIMATOR_LAWS", "check_estimator"]

Tree = Any

ESTIMATOR_LAWS: dict[str, Callable[..., None]] = {}


def check_estimator(
    estimator: Estimator,
    meta_params: Tree,
    *,
    true_gradient: Tree = None,
    num_estimates: int = 1,
    num_seeds: int = 16,
    max_errors: float = 3.0,
    laws: Collection[str] | None = None,
    exclude: Collection[str] = (),
    seed: int = 0,
) -> Report:
    """Checks that an estimator obeys the laws that the outer loop relies on.

    Every law in ``fmeta.testing.ESTIMATOR_LAWS`` can also be called by itself, as
    ``law(estimator, meta_params, seed=0)``.

    Args:
        estimator: fmeta's or your own.
        meta_params: where the meta-gradient is estimated, a tree of floating tensors.
        true_gradient: what the mean of many estimates is to be, like ``meta_params``; None: the
            law ``unbiased`` is not run. Give it, and the meta-parameters, in float64.
        num_estimates: estimates made one after the other with each seed, whose mean is compared;
            for trainings that go on between estimates as many as a whole training has.
        num_seeds: how many such means, each of a seed of its own.
        max_errors: standard errors that their mean may be away from the true gradient, in norm.
        laws: names of the laws to run; default all.
        exclude: names of laws that it need not obey.
        seed: of the estimates.

    Returns:
        A `Report`: which laws were run, each on ``"meta_params"``, and why the others were not.

    Raises:
        AssertionError: the first law that does not hold, with its name and a cure.
        ValueError: for an unknown name of a law, or too few seeds for a standard error.
        TypeError: for anything but an `Estimator`.

    Example:
        >>> import fmeta
        >>> rule = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.1)
        >>> family = fmeta.tasks.quadratic()
        >>> estimator = fmeta.estimators.full(rule, family, num_tasks=2, horizon=3)
        >>> check_estimator(estimator, rule.init(), laws=["pure"]).held
        {'pure': ('meta_params',)}
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"check_estimator takes an Estimator, got a {type(estimator).__name__}: build one with "
            "fmeta.estimators, or of two functions Estimator(init, estimate)"
        )
    for name in (*(laws or ()), *exclude):
        if name not in ESTIMATOR_LAWS:
            raise ValueError(f"there is no law {name!r}; there are {', '.join(ESTIMATOR_LAWS)}")
    if num_estimates < 1 or num_seeds < 2:
        raise ValueError(
            "num_estimates must be at least 1 and num_seeds at least 2, got "
            f"{num_estimates} and {num_seeds}"
        )
    comparison = {
        "true_gradient": true_gradient,
        "num_estimates": num_estimates,
        "num_seeds": num_seeds,
        "max_errors": max_errors,
    }
    held: dict[str, tuple[str, ...]] = {}
    not_run: dict[str, str] = {}
    for name, law in ESTIMATOR_LAWS.items():
        if name in exclude:
            not_run[name] = "excluded"
        elif laws is not None and name not in laws:
            not_run[name] = "not among `laws`"
        elif name == "unbiased" and true_gradient is None:
            not_run[name] = "no true gradient was given"
        else:
            law(estimator, meta_params, seed=seed, **(comparison if name == "unbiased" else {}))
            held[name] = ("meta_params",)
    return Report(held, not_run)


def _law(check: Callable[..., None]) -> Callable[..., None]:
    """Registers a law; whatever the estimator raises in it becomes an AssertionError."""
    name = check.__name__

    @functools.wraps(check)
    def wrapped(estimator: Estimator, meta_params: Tree, *, seed: int = 0, **own: Any) -> None:
        with of_law(name, "estimator"):
            check(estimator, meta_params, seed=seed, **own)

    ESTIMATOR_LAWS[name] = wrapped
    return wrapped


@_law
def state_is_data(estimator: Estimator, meta_params: Tree, *, seed: int) -> None:
    """A state holds integers and tensors only, in a structure that estimates keep."""
    state = estimator.init(meta_params, seed)
    for where in ("estimate 0", "estimate 1"):
        for leaf, x in zip(leaf_names(state, "state"), trees.leaves(state), strict=True):
            assert isinstance(x, Tensor) or type(x) is int, (
                f"{leaf} is a {type(x).__name__} before {where}: a state holds integers and "
                "tensors, so that it can be saved; draw from fmeta.random.fold_in(seed, step, ...)"
            )
            assert not isinstance(x, Tensor) or not x.requires_grad, (
                f"{leaf} carries a graph before {where}: compute it under torch.no_grad()"
            )
        after = estimator.estimate(meta_params, state)[1]
        before_tensors, after_tensors = (
            trees.map(lambda x: x if isinstance(x, Tensor) else torch.tensor(x), s)
            for s in (state, after)
        )
        cure = "let `init` give it the kind that it will have"
        assert_same_kinds(before_tensors, after_tensors, "state", where, cure)
        state = after


@_law
def pure(estimator: Estimator, meta_params: Tree, *, seed: int) -> None:
    """An estimate is a function of ``(meta_params, state)``, which it leaves as they are."""
    _, state = estimator.estimate(meta_params, estimator.init(meta_params, seed))
    named = {"meta_params": meta_params, "state": state}
    before = {name: remembered(tree) for name, tree in named.items()}
    globals_before = _global_states()
    first = estimator.estimate(meta_params, state)
    for changed in _changed(globals_before, _global_states()):
        raise AssertionError(
            f"estimate used {changed}: draw from fmeta.random.fold_in(seed, step, ...)"
        )
    for name, tree in named.items():
        assert_same_tensors(before[name], tree, name, "estimate")
    again = estimator.estimate(meta_params, state)
    for name, got, want in (
        ("the estimate", again[0], first[0]),
        ("the state after it", again[1], first[1]),
    ):
        where = "from equal arguments once more (keep nothing outside of the state)"
        assert_close(got, want, name, where, rtol=0)


@_law
def seeded(estimator: Estimator, meta_params: Tree, *, seed: int) -> None:
    """``init`` is a function of the seed, and other seeds and later estimates draw other tasks."""
    globals_before = _global_states()
    one, same, other = (estimator.init(meta_params, s) for s in (seed, seed, seed + 1))
    for changed in _changed(globals_before, _global_states()):
        raise AssertionError(f"init used {changed}: draw from fmeta.random.fold_in(seed, ...)")
    assert_close(same, one, "state", "of init with an equal seed once more", rtol=0)
    first, later = estimator.estimate(meta_params, one)
    for what, state in (("another seed", other), ("the next state", later)):
        found, _ = estimator.estimate(meta_params, state)
        differs = any(
            not torch.equal(x, y)
            for x, y in zip(trees.leaves(found.grads), trees.leaves(first.grads), strict=True)
        )
        assert differs, (
            f"the gradient is the same with {what}: let what is drawn depend on seed and step; "
            "exclude this law where nothing is"
        )


@_law
def resumes(estimator: Estimator, meta_params: Tree, *, seed: int) -> None:
    """A state that went through a file, or was rebuilt from its leaves, goes on in the same way."""
    _, state = estimator.estimate(meta_params, estimator.init(meta_params, seed))
    want = estimator.estimate(meta_params, state)
    flat, spec = trees.flatten(state)
    tensors = {n: x for n, x in _files.by_path(state).items() if isinstance(x, Tensor)}
    saved: dict[str, Tensor] = {}
    if tensors:
        with tempfile.TemporaryDirectory() as folder:
            _files.save_tree(Path(folder, "state.safetensors"), tensors)
            saved = _files.load_tree(Path(folder, "state.safetensors"), tensors)
    read = [saved.get(name, x) for name, x in zip(trees.paths(state), flat, strict=True)]
    got = estimator.estimate(meta_params, trees.unflatten(spec, read))
    for name, x, y in (("the estimate", got[0], want[0]), ("the state after it", got[1], want[1])):
        where = "of a state that was saved and read (keep nothing outside of its tensors)"
        assert_close(x, y, name, where, rtol=0)


@_law
def gradient_fits(estimator: Estimator, meta_params: Tree, *, seed: int) -> None:
    """The loss is a finite scalar, the gradient shaped like the meta-parameters and finite."""
    found, _ = estimator.estimate(meta_params, estimator.init(meta_params, seed))
    assert isinstance(found, Estimate), (
        f"estimate returned a {type(found).__name__} first, not an Estimate(loss, grads, metrics)"
    )
    is_scalar = isinstance(found.loss, Tensor) and found.loss.shape == ()
    assert is_scalar, "the loss is no scalar tensor: take the mean over tasks"
    assert bool(found.loss.isfinite()), f"the loss is {float(found.loss)} at meta_params"
    assert_same_kinds(
        meta_params, found.grads, "grads", "estimate", "give it the kind of meta_params"
    )
    for leaf, x in zip(leaf_names(found.grads, "grads"), trees.leaves(found.grads), strict=True):
        assert bool(x.isfinite().all()), f"{leaf} is not finite at meta_params"
    for leaf, x in zip(
        leaf_names((found.loss, found.grads), "estimate"),
        trees.leaves((found.loss, found.grads)),
        strict=True,
    ):
        assert not x.requires_grad, f"{leaf} carries a graph: detach it"


@_law
def metrics_named(estimator: Estimator, meta_params: Tree, *, seed: int) -> None:
    """Metrics are tensors by name; those that the outer loop reads are what it takes them for."""
    found, _ = estimator.estimate(meta_params, estimator.init(meta_params, seed))
    assert isinstance(found.metrics, dict), f"metrics are a {type(found.metrics).__name__}"
    for name, x in found.metrics.items():
        assert isinstance(name, str), f"metrics have the key {name!r}: it must be a string"
        assert isinstance(x, Tensor), f"metrics[{name!r}] is a {type(x).__name__}, not a tensor"
        assert not x.requires_grad, f"metrics[{name!r}] carries a graph: detach it"
    for name in ("signal_to_noise", "standard_error"):
        shape = tuple(found.metrics[name].shape) if name in found.metrics else ()
        assert shape == (), f"metrics[{name!r}] has shape {shape}: it must be a scalar"
    diverged = found.metrics.get("diverged")
    if diverged is None:
        assert "diverged_at" not in found.metrics, "metrics have diverged_at without diverged"
        return
    is_flags = diverged.dtype is torch.bool and diverged.ndim == 1
    assert is_flags, (
        f"metrics['diverged'] is {short(diverged.dtype)} of shape {tuple(diverged.shape)}: it must "
        "be a boolean for each task"
    )
    for name in ("diverged_at", "drawn", "family"):
        x = found.metrics.get(name)
        assert x is None or len(x) == len(diverged), (
            f"metrics[{name!r}] has shape {tuple(x.shape)}: it must have a row for each of "
            f"{len(diverged)} tasks"
        )
    at = found.metrics.get("diverged_at")
    assert at is None or not bool((at[~diverged] != -1).any()), (
        "metrics['diverged_at'] names a step of a task that did not diverge: it must be -1 there"
    )


@_law
def unbiased(
    estimator: Estimator,
    meta_params: Tree,
    *,
    seed: int,
    true_gradient: Tree,
    num_estimates: int = 1,
    num_seeds: int = 16,
    max_errors: float = 3.0,
) -> None:
    """The mean of many estimates is the true gradient, up to some standard errors."""
    want = _flat(meta_params, true_gradient, "true_gradient")
    rows = []
    for s in range(num_seeds):
        state, total = estimator.init(meta_params, seed + s), torch.zeros_like(want)
        for _ in range(num_estimates):
            found, state = estimator.estimate(meta_params, state)
            total = total + _flat(meta_params, found.grads, "grads")
        rows.append(total / num_estimates)
    seen = torch.stack(rows)
    gap = float((seen.mean(0) - want).norm())
    error = float((seen.var(0) / num_seeds).sum().sqrt())
    rounding = 1e-6 * float(want.norm())  # all that is left where nothing is random
    assert gap <= max_errors * error + rounding, (
        f"the mean of {num_seeds * num_estimates} estimates is {gap:.3g} away from the true "
        f"gradient of norm {float(want.norm()):.3g}; its standard error is {error:.3g}"
    )


def _flat(like: Tree, tree: Tree, what: str) -> Tensor:
    found = trees.match(like, tree, what, allow_none=False)
    return torch.cat([x.detach().double().flatten().cpu() for x in found])
