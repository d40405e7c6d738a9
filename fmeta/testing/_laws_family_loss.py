"""Laws of what a family of tasks computes: its loss, metrics and extras."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.random import fold_in
from fmeta.tasks import Task, TaskFamily, loss_of_task, stack_tasks
from fmeta.testing._compare import assert_close, leaf_names, short
from fmeta.testing._family_law import check_scalar, first_batch, law, without_global

Tree = Any


@law
def loss_is_scalar(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """The loss is a floating scalar, and finite at the initial parameters."""
    for task in draw():
        loss = loss_of_task(family)(task.model_params, first_batch(task.batches), task.config)
        check_scalar(loss, "loss")
        assert loss.is_floating_point(), f"loss is {short(loss.dtype)}: it must be floating"
        assert bool(loss.isfinite()), (
            f"loss is {float(loss)} at the initial parameters: scale them, or what goes in, down"
        )


@law
def loss_deterministic(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """The loss of equal arguments is equal, and draws nothing."""
    task = draw()[0]
    arguments = (family.data, task.config, task.model_params, first_batch(task.batches))
    cure = "draw noise in batches, and let loss read it"
    calls: dict[str, Callable[..., Any]] = {"loss": family.loss}
    if family.metrics is not None:
        calls["metrics"] = family.metrics
    if family.extras is not None:
        calls["extras"] = family.extras
    for where, function in calls.items():
        call = functools.partial(function, *arguments)
        got = without_global(where, call, cure)
        for _i in range(2):
            assert_close(call(), got, where, f"called once more ({cure})", rtol=0)


@law
def twice_differentiable(
    family: TaskFamily, draw: Callable[[], list[Task]], *, seed: int, **_: Any
) -> None:
    """The loss has a finite gradient, not all zero, whose derivative is that of differences.

    In float64, which the loss must follow, along a random direction. Differences are taken beside
    the initial parameters: there, biases of zero put a relu exactly on its kink.
    """
    task = draw()[0]
    double = (family.data, task.config, task.model_params, first_batch(task.batches))
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


@law
def vmap_equals_loop(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Loss and gradient under `vmap` over tasks equal those of one task after another."""
    tasks = draw()
    both = torch.func.grad_and_value(loss_of_task(family))
    together = stack_tasks([t._replace(batches=first_batch(t.batches)) for t in tasks])
    grads, losses = torch.vmap(both)(together.model_params, together.batches, together.config)
    if family.metrics is not None:
        per_task = functools.partial(family.metrics, family.data)
        torch.vmap(per_task)(together.config, together.model_params, together.batches)
    told: Tree = None
    if family.extras is not None:
        give = functools.partial(family.extras, family.data)
        told = torch.vmap(give)(together.config, together.model_params, together.batches)
    for i, task in enumerate(tasks):
        want, loss = both(task.model_params, first_batch(task.batches), task.config)
        where = f"of task {i} under vmap, beside the loop"
        scale = max(float(g.abs().max()) for g in trees.leaves(want) if g.numel())
        assert_close(losses[i], loss, "loss", where, rtol=1e-4)
        got = trees.map(lambda g, i=i: g[i], grads)
        assert_close(got, want, "gradient", where, rtol=1e-4, atol=1e-5 * scale)
        if family.extras is not None:
            own = family.extras(
                family.data, task.config, task.model_params, first_batch(task.batches)
            )
            got = trees.map(lambda x, i=i: x[i], told)
            assert_close(got, own, "extras", where, rtol=1e-4, atol=1e-5)


@law
def runs_on_meta(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Loss and gradient follow their arguments to the `meta` device, and so to any other."""
    task = draw()[0]
    moved = trees.map(
        lambda x: x.to("meta"),
        (family.data, task.config, task.model_params, first_batch(task.batches)),
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


@law
def metrics_are_scalars(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Metrics are a dict of finite floating scalars by name, the same names for every task."""
    assert family.metrics is not None, "the family has no metrics"
    names = None
    for task in draw():
        found = family.metrics(
            family.data, task.config, task.model_params, first_batch(task.batches)
        )
        assert isinstance(found, dict), f"metrics are a {type(found).__name__}, not a dict"
        for name, x in found.items():
            assert isinstance(name, str), f"metrics have the key {name!r}: it must be a string"
            check_scalar(x, f"metrics[{name!r}]")
            assert x.is_floating_point(), f"metrics[{name!r}] is {short(x.dtype)}, not floating"
            assert bool(x.isfinite()), f"metrics[{name!r}] is {float(x)} at the initial parameters"
        assert names is None or set(found) == names, (
            f"metrics are {', '.join(found)}, of another task {', '.join(names or ())}"
        )
        names = set(found)


@law
def extras_are_tensors(family: TaskFamily, draw: Callable[[], list[Task]], **_: Any) -> None:
    """Extras are a dict of trees of finite tensors by name, of one structure for every task."""
    assert family.extras is not None, "the family has no extras"
    kinds = None
    for task in draw():
        found = family.extras(
            family.data, task.config, task.model_params, first_batch(task.batches)
        )
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
