"""`check_family`: the laws of a family of tasks, which estimators and evaluation rely on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.random import fold_in
from fmeta.tasks import Task, TaskFamily, loss_of_task, sample_task, stack_tasks
from fmeta.testing._check import Report
from fmeta.testing._compare import (
    assert_close,
    assert_same_tensors,
    leaf_names,
    remembered,
    short,
)
from fmeta.testing._laws_step import _changed, _global_states

__all__ = ["FAMILY_LAWS", "check_family"]

Tree = Any

FAMILY_LAWS: dict[str, Callable[..., None]] = {}


def check_family(
    family: TaskFamily,
    *,
    splits: Collection[str] = ("train", "validation", "test"),
    laws: Collection[str] | None = None,
    exclude: Collection[str] = (),
    steps: int = 3,
    num_tasks: int = 3,
    seed: int = 0,
) -> Report:
    """Checks that a family of tasks obeys the laws that estimators and evaluation rely on.

    Every law in ``fmeta.testing.FAMILY_LAWS`` can also be called by itself, as
    ``law(family, split="train", steps=3, num_tasks=3, seed=0)``.

    Args:
        family: fmeta's or your own; of a mixture, each family by itself.
        splits: the splits it has, in which every law is checked.
        laws: names of the laws to run; default all.
        exclude: names of laws that it need not obey.
        steps: number of batches that are drawn.
        num_tasks: how many tasks, all of one structure.
        seed: of all draws.

    Returns:
        A `Report`: which laws were run, in which splits, and why the others were not.

    Raises:
        AssertionError: the first law that does not hold, with its name, the split and a cure.
        ValueError: for an unknown name of a law, or nothing to check.

    Example:
        >>> import fmeta
        >>> report = check_family(fmeta.tasks.quadratic(), laws=["loss_is_scalar"])
        >>> report.held
        {'loss_is_scalar': ('train', 'validation', 'test')}
    """
    if not isinstance(family, TaskFamily):
        raise TypeError(
            f"check_family takes a TaskFamily, got a {type(family).__name__}: of a mixture, check "
            "each of its families"
        )
    for name in (*(laws or ()), *exclude):
        if name not in FAMILY_LAWS:
            raise ValueError(f"there is no law {name!r}; there are {', '.join(FAMILY_LAWS)}")
    for what, value in (("splits", len(splits)), ("steps", steps), ("num_tasks", num_tasks)):
        if value < 1:
            raise ValueError(f"there is nothing to check with {what} of {value}: give at least one")
    held: dict[str, tuple[str, ...]] = {}
    not_run: dict[str, str] = {}
    for name, law in FAMILY_LAWS.items():
        if name in exclude:
            not_run[name] = "excluded"
        elif laws is not None and name not in laws:
            not_run[name] = "not among `laws`"
        elif name == "metrics_are_scalars" and family.metrics is None:
            not_run[name] = "the family has no metrics"
        elif name == "extras_are_tensors" and family.extras is None:
            not_run[name] = "the family has no extras"
        elif name == "splits_differ" and len(splits) == 1:
            not_run[name] = "there is one split only"
        else:
            for split in splits:
                others = {"others": splits} if name == "splits_differ" else {}
                law(family, split=split, steps=steps, num_tasks=num_tasks, seed=seed, **others)
            held[name] = tuple(splits)
    return Report(held, not_run)


def _law(check: Callable[..., None]) -> Callable[..., None]:
    """Registers a law; whatever the family raises in it becomes an AssertionError."""
    name = check.__name__

    @functools.wraps(check)
    def wrapped(
        family: TaskFamily,
        *,
        split: str = "train",
        steps: int = 3,
        num_tasks: int = 3,
        seed: int = 0,
        **own: Any,
    ) -> None:
        draw = functools.partial(_drawn, family, split, steps, num_tasks, seed)
        try:
            check(family, draw, split=split, steps=steps, seed=seed, **own)
        except AssertionError as error:
            raise AssertionError(f"law {name}: {error} [split {split!r}]") from error.__cause__
        except Exception as error:
            raise AssertionError(
                f"law {name}: the family raised {type(error).__name__}: {error} [split {split!r}]"
            ) from error

    FAMILY_LAWS[name] = wrapped
    return wrapped


def _drawn(family: TaskFamily, split: str, steps: int, num_tasks: int, seed: int) -> list[Task]:
    return [sample_task(family, steps, seed, i, split=split) for i in range(num_tasks)]


def _first(tree: Tree) -> Tree:
    """The first of the batches."""
    return trees.map(lambda x: x[0], tree)


@_law
def made_of_tensors(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Data, config, parameters and batches are trees of tensors; the parameters floating."""
    for task in draw():
        for name, tree in {"data": family.data, **task._asdict()}.items():
            for leaf, x in zip(leaf_names(tree, name), trees.leaves(tree), strict=True):
                assert isinstance(x, Tensor), (
                    f"{leaf} is a {type(x).__name__}, not a tensor: numbers that all tasks share "
                    "belong to the builder of the family, others become tensors"
                )
                assert name != "model_params" or x.is_floating_point(), (
                    f"{leaf} is {short(x.dtype)}: parameters are floating; put others into config"
                )


@_law
def inputs_unchanged(
    family: TaskFamily, draw: Callable[[], list[Task]], *, split: str, steps: int, seed: int
) -> None:
    """No function of the family edits its arguments, neither tensors nor containers."""
    task = draw()[0]
    config = family.sample(fold_in(seed))  # the task's own has been through `init` already
    named = {
        "data": family.data,
        "config": config,
        "model_params": task.model_params,
        "batch": _first(task.batches),
    }
    before = {name: remembered(tree) for name, tree in named.items()}
    calls: dict[str, Callable[[], Any]] = {
        "init": lambda: family.init(config, fold_in(seed)),
        "batches": lambda: family.batches(config, fold_in(seed), steps, split=split),
        "loss": lambda: family.loss(*named.values()),
    }
    if family.metrics is not None:
        metrics = family.metrics
        calls["metrics"] = lambda: metrics(*named.values())
    if family.extras is not None:
        extras = family.extras
        calls["extras"] = lambda: extras(*named.values())
    for where, call in calls.items():
        call()
        for name, tree in named.items():
            assert_same_tensors(before[name], tree, name, where)


@_law
def drawn_from_generator_alone(
    family: TaskFamily, draw: Any, *, split: str, steps: int, seed: int
) -> None:
    """Equal generators give equal draws, whatever else was drawn; the global ones are not used."""
    config = family.sample(fold_in(seed, 0))
    calls: dict[str, Callable[[], Tree]] = {
        "sample": lambda: family.sample(fold_in(seed, 0)),
        "init": lambda: family.init(config, fold_in(seed, 1)),
        "batches": lambda: family.batches(config, fold_in(seed, 2), steps, split=split),
    }
    for where, call in calls.items():
        got = _without_global(where, call, "draw from the generator given to it")
        assert_close(call(), got, where, "with an equal generator once more", rtol=0)
    one, other = (family.batches(config, fold_in(seed, i), steps, split=split) for i in (2, 3))
    assert not _equal(one, other), (
        "batches are the same for another generator: draw them from it, or tasks and seeds will "
        "not differ"
    )


@_law
def steps_lead(family: TaskFamily, draw: Any, *, split: str, steps: int, seed: int) -> None:
    """The leading dimension of every tensor in the batches is the number of steps."""
    config = family.sample(fold_in(seed, 0))
    for number in (steps, 1, steps + 2):
        drawn = family.batches(config, fold_in(seed, 2), number, split=split)
        flat = trees.leaves(drawn)
        assert flat, "batches hold no tensor: give at least a tensor of `steps` indices or zeros"
        for leaf, x in zip(leaf_names(drawn, "batches"), flat, strict=True):
            assert x.shape[:1] == (number,), (
                f"{leaf} has shape {tuple(x.shape)} for {number} steps: its leading dimension must "
                "be the steps; what all of them share belongs to data or config"
            )


@_law
def splits_differ(
    family: TaskFamily,
    draw: Callable[[], list[Task]],
    *,
    split: str,
    steps: int,
    seed: int,
    others: Collection[str] = ("train", "validation", "test"),
) -> None:
    """Another split has other batches, while config and initial parameters are the same."""
    task = draw()[0]
    for other in others:
        if other == split:
            continue
        there = sample_task(family, steps, seed, 0, split=other)
        assert not _equal(task.batches, there.batches), (
            f"the batches are those of split {other!r} too: draw them from the split's images, or "
            "from the generator"
        )
        assert_close(there[:2], task[:2], "(config, model_params)", f"in split {other!r}", rtol=0)


@_law
def loss_is_scalar(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """The loss is a floating scalar, and finite at the initial parameters."""
    for task in draw():
        loss = loss_of_task(family)(task.model_params, _first(task.batches), task.config)
        _check_scalar(loss, "loss")
        assert loss.is_floating_point(), f"loss is {short(loss.dtype)}: it must be floating"
        assert bool(loss.isfinite()), (
            f"loss is {float(loss)} at the initial parameters: scale them, or what goes in, down"
        )


@_law
def loss_deterministic(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """The loss of equal arguments is equal, and draws nothing."""
    task = draw()[0]
    arguments = (family.data, task.config, task.model_params, _first(task.batches))
    cure = "draw noise in batches, and let loss read it"
    calls: dict[str, Callable[..., Any]] = {"loss": family.loss}
    if family.metrics is not None:
        calls["metrics"] = family.metrics
    if family.extras is not None:
        calls["extras"] = family.extras
    for where, function in calls.items():
        call = functools.partial(function, *arguments)
        got = _without_global(where, call, cure)
        for _i in range(2):
            assert_close(call(), got, where, f"called once more ({cure})", rtol=0)


@_law
def twice_differentiable(
    family: TaskFamily, draw: Callable[[], list[Task]], *, seed: int, **_: Any
) -> None:
    """The loss has a finite gradient, not all zero, whose derivative is that of differences.

    In float64, which the loss must follow, along a random direction. Differences are taken beside
    the initial parameters: there, biases of zero put a relu exactly on its kink.
    """
    task = draw()[0]
    double = (family.data, task.config, task.model_params, _first(task.batches))
    data, config, params, batch = trees.cast(double, torch.float64)
    generator = fold_in(seed, 3)

    def normal() -> Tree:
        return trees.map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), params)

    along = normal()
    near = trees.map(lambda p, d: p + 0.01 * d, params, normal())
    gradient = torch.func.grad(lambda p: family.loss(data, config, p, batch))

    def inner(one: Tree) -> Tensor:
        products = trees.map(lambda x, d: (x * d).sum(), one, along)
        return torch.stack(trees.leaves(products)).sum()

    def slope(p: Tree) -> Tensor:
        return inner(gradient(p))

    first, second = gradient(params), torch.func.grad(slope)(params)
    for name, found in (("gradient", first), ("second derivative", second)):
        for leaf, g in zip(leaf_names(found, name), trees.leaves(found), strict=True):
            assert bool(g.isfinite().all()), f"{leaf} is not finite at the initial parameters"
    assert any(bool(g.count_nonzero()) for g in trees.leaves(first)), (
        "the gradient of the loss is zero everywhere: nothing between parameters and loss may "
        "detach, round or take an argmax"
    )
    eps = 1e-6
    up, down = (slope(trees.map(lambda p, d, e=e: p + e * d, near, along)) for e in (eps, -eps))
    want, got = float(up - down) / (2 * eps), float(inner(torch.func.grad(slope)(near)))
    assert abs(got - want) <= 1e-3 * abs(want) + 1e-6 * (1 + abs(float(up))), (
        f"the second derivative along a random direction is {got:.6g}, differences of the gradient "
        f"give {want:.6g}: use operations that torch can differentiate twice"
    )


@_law
def vmap_equals_loop(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Loss and gradient under `vmap` over tasks equal those of one task after another."""
    tasks = draw()
    both = torch.func.grad_and_value(loss_of_task(family))
    together = stack_tasks([t._replace(batches=_first(t.batches)) for t in tasks])
    grads, losses = torch.vmap(both)(together.model_params, together.batches, together.config)
    if family.metrics is not None:
        per_task = functools.partial(family.metrics, family.data)
        torch.vmap(per_task)(together.config, together.model_params, together.batches)
    told: Tree = None
    if family.extras is not None:
        give = functools.partial(family.extras, family.data)
        told = torch.vmap(give)(together.config, together.model_params, together.batches)
    for i, task in enumerate(tasks):
        want, loss = both(task.model_params, _first(task.batches), task.config)
        where = f"of task {i} under vmap, beside the loop"
        scale = max(float(g.abs().max()) for g in trees.leaves(want) if g.numel())
        assert_close(losses[i], loss, "loss", where, rtol=1e-4)
        got = trees.map(lambda g, i=i: g[i], grads)
        assert_close(got, want, "gradient", where, rtol=1e-4, atol=1e-5 * scale)
        if family.extras is not None:
            own = family.extras(family.data, task.config, task.model_params, _first(task.batches))
            got = trees.map(lambda x, i=i: x[i], told)
            assert_close(got, own, "extras", where, rtol=1e-4, atol=1e-5)


@_law
def runs_on_meta(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Loss and gradient follow their arguments to the `meta` device, and so to any other."""
    task = draw()[0]
    moved = trees.map(
        lambda x: x.to("meta"),
        (family.data, task.config, task.model_params, _first(task.batches)),
    )
    cure = "build constants from data, config or batch, on their device"
    try:
        grads, loss = torch.func.grad_and_value(family.loss, argnums=2)(*moved)
    except Exception as error:
        raise AssertionError(
            f"on the meta device, loss raised {type(error).__name__}: {error}; {cure}, and let no "
            "value decide what is computed"
        ) from error
    named = zip(leaf_names(grads, "gradient"), trees.leaves(grads), strict=True)
    for leaf, x in (("loss", loss), *named):
        assert x.is_meta, f"{leaf} is on {x.device}, its arguments on meta: {cure}"
    if family.extras is None:
        return
    found = family.extras(*moved)
    for leaf, x in zip(leaf_names(found, "extras"), trees.leaves(found), strict=True):
        assert x.is_meta, f"{leaf} is on {x.device}, its arguments on meta: {cure}"


@_law
def metrics_are_scalars(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Metrics are a dict of finite floating scalars by name, the same names for every task."""
    assert family.metrics is not None, "the family has no metrics"
    names = None
    for task in draw():
        found = family.metrics(family.data, task.config, task.model_params, _first(task.batches))
        assert isinstance(found, dict), f"metrics are a {type(found).__name__}, not a dict"
        for name, x in found.items():
            assert isinstance(name, str), f"metrics have the key {name!r}: it must be a string"
            _check_scalar(x, f"metrics[{name!r}]")
            assert x.is_floating_point(), f"metrics[{name!r}] is {short(x.dtype)}, not floating"
            assert bool(x.isfinite()), f"metrics[{name!r}] is {float(x)} at the initial parameters"
        assert names is None or set(found) == names, (
            f"metrics are {', '.join(found)}, of another task {', '.join(names or ())}"
        )
        names = set(found)


@_law
def extras_are_tensors(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Extras are a dict of trees of finite tensors by name, of one structure for every task."""
    assert family.extras is not None, "the family has no extras"
    kinds = None
    for task in draw():
        found = family.extras(family.data, task.config, task.model_params, _first(task.batches))
        assert isinstance(found, dict), f"extras are a {type(found).__name__}, not a dict"
        for name in found:
            assert isinstance(name, str), f"extras have the key {name!r}: it must be a string"
        leaves = dict(zip(leaf_names(found, "extras"), trees.leaves(found), strict=True))
        for leaf, x in leaves.items():
            assert isinstance(x, Tensor), f"{leaf} is a {type(x).__name__}, not a tensor"
            assert bool(x.isfinite().all()), f"{leaf} is not finite at the initial parameters"
        now = {leaf: (x.shape, x.dtype) for leaf, x in leaves.items()}
        assert kinds is None or now == kinds, (
            "extras have other names, shapes or dtypes for another task: a family has one structure"
        )
        kinds = now


def _check_scalar(x: Any, name: str) -> None:
    assert isinstance(x, Tensor), f"{name} is a {type(x).__name__}, not a tensor"
    assert x.shape == (), f"{name} has shape {tuple(x.shape)}: take a mean or a sum"


def _without_global(where: str, call: Callable[[], Any], cure: str) -> Any:
    before = _global_states()
    got = call()
    for name in _changed(before, _global_states()):
        raise AssertionError(f"{where} used {name}: {cure}")
    return got


def _equal(one: Tree, other: Tree) -> bool:
    pairs = zip(trees.leaves(one), trees.leaves(other), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
