"""What the laws share: a small problem for an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from fmeta import trees
from fmeta._unroll import Run, unroll
from fmeta.optimizer import Optimizer
from fmeta.random import fold_in

__all__ = ["Case", "built_in_trees", "floating", "reversed_keys"]

Tree = Any


class Block(NamedTuple):
    """A node of the built-in trees."""

    weight: Tensor
    bias: Tensor


def built_in_trees(device: torch.device | str = "cpu") -> dict[str, Tree]:
    """The parameter trees of `check_optimizer`, in float64: a small one, and one with every node.

    The second has so many leaves of one shape that lifted rules stack them, and an empty one.
    """

    def draw(index: int, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=fold_in(17, index), dtype=torch.float64)
        return x.to(device)

    small = {"w": draw(0, 4, 3), "b": draw(1, 3), "scale": draw(2)}
    nested = {
        "layers": [Block(draw(10 + i, 2, 3), draw(20 + i, 2)) for i in range(4)],
        "norm": ({"gain": draw(3, 2), "shift": draw(4, 2)}, draw(5)),
        "conv": draw(6, 2, 3, 2, 2),
        "empty": draw(7, 0),
    }
    return {"small": small, "nested": nested}


class Case:
    """An optimizer with everything it needs to be run on a parameter tree.

    Args:
        optimizer: an `Optimizer`, or a function of the parameter tree that builds one.
        params: tree of floating tensors.
        opt_params: what the optimizer learned; default ``optimizer.init`` with a seeded generator.
        extras: what the rule needs by name, for one step: a dict, or a function of the parameters
            that gives it, called at those of each step.
        num_steps: the horizon given to ``init_hidden``.
        seed: of gradients and targets.
    """

    def __init__(
        self,
        optimizer: Any,
        params: Tree,
        *,
        opt_params: Tree = None,
        extras: Any = None,
        num_steps: int = 8,
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            if not callable(optimizer):
                raise TypeError(
                    "laws take an fmeta.Optimizer, or a function of the parameter tree that builds "
                    f"one, got a {type(optimizer).__name__}"
                )
            optimizer = optimizer(params)
        self.optimizer: Optimizer = optimizer
        self.num_steps, self.seed, self._extras = num_steps, seed, extras
        if opt_params is None:
            opt_params = optimizer.init(fold_in(seed, 1))
        device = trees.common_device(params)
        self.params = params
        self.opt_params = _moved(opt_params, device=device)

    def cast(self, dtype: torch.dtype, opt_dtype: torch.dtype | None = None) -> Case:
        """The case with parameters in ``dtype`` and, where given, opt_params in ``opt_dtype``."""
        th = self.opt_params if opt_dtype is None else trees.cast(self.opt_params, opt_dtype)
        return self.replaced(trees.cast(self.params, dtype), th)

    def double(self) -> Case:
        """The case in float64 throughout."""
        return self.cast(torch.float64, torch.float64)

    def replaced(self, params: Tree, opt_params: Tree = None) -> Case:
        """The case with other parameters of the same structure."""
        new = object.__new__(Case)
        new.__dict__.update(self.__dict__)
        new.params = params
        if opt_params is not None:
            new.opt_params = opt_params
        return new

    def to(self, device: str) -> Case:
        """The case on another device."""
        return self.replaced(
            _moved(self.params, device=device), _moved(self.opt_params, device=device)
        )

    def extras(self, params: Tree) -> Any:
        """The extras of one step, on the device of the parameters."""
        value = self._extras(params) if callable(self._extras) else self._extras
        device = trees.common_device(params)
        return None if value is None else _moved(value, device=device)

    def start(self, params: Tree, opt_params: Tree = None) -> Tree:
        """``init_hidden`` with the case's horizon."""
        th = self.opt_params if opt_params is None else opt_params
        return self.optimizer.init_hidden(th, params, num_steps=self.num_steps)

    def grads(self, t: int, params: Tree | None = None) -> Tree:
        """Random gradients of step ``t``: of the parameters' shapes, dtypes and device."""
        flat, spec = trees.flatten(self.params if params is None else params)
        return trees.unflatten(
            spec, [self._draw(i, t, p.shape).to(p.device, p.dtype) for i, p in enumerate(flat)]
        )

    def step(
        self, params: Tree, grads: Tree, hidden: Tree, opt_params: Tree = None
    ) -> tuple[Tree, Tree]:
        """``optimizer.step`` with a loss and the extras."""
        return self.optimizer.step(
            *self._arguments(params, grads, hidden, opt_params), **self.given(params)
        )

    def update(
        self, params: Tree, grads: Tree, hidden: Tree, opt_params: Tree = None
    ) -> tuple[Tree, Tree]:
        """``optimizer.update`` with a loss and the extras."""
        return self.optimizer.update(
            *self._arguments(params, grads, hidden, opt_params), **self.given(params)
        )

    def given(self, params: Tree = None) -> dict[str, Any]:
        """The keyword arguments of a step at these parameters; default those of the case."""
        first = next(x for x in trees.leaves(self.params) if x is not None)
        loss = torch.full((), 0.7, dtype=trees.compute_dtype(first), device=first.device)
        return {"loss": loss, "extras": self.extras(self.params if params is None else params)}

    def warm(self, steps: int = 2) -> tuple[Tree, Tree]:
        """Parameters and hidden state after some steps."""
        params, hidden = self.params, self.start(self.params)
        for t in range(steps):
            params, hidden = self.step(params, self.grads(t), hidden)
        return params, hidden

    def unroll(
        self, opt_params: Tree, params: Tree, *, steps: int, loss: Any = None, **options: Any
    ) -> Run:
        """An unroll on a smooth problem with another target for each parameter and step."""
        flat = trees.leaves(params)
        batches = tuple(
            torch.stack([self._draw(i, 100 + t, p.shape) for t in range(steps)]).to(
                p.device, p.dtype
            )
            for i, p in enumerate(flat)
        )
        extras: Any = (lambda params, batch: self.extras(params)) if self._extras else None
        loss = smooth_loss if loss is None else loss
        return unroll(
            self.optimizer, loss, opt_params, params, batches,
            extras=extras, num_steps=self.num_steps, **options,
        )  # fmt: skip

    def objective(self, opt_params: Tree, params: Tree, *, steps: int, **options: Any) -> Tensor:
        """A meta-loss that every update of an unroll changes."""
        run = self.unroll(opt_params, params, steps=steps, **options)
        end = [p.square().sum() for p in trees.leaves(run.params)]
        return run.losses.sum() + torch.stack(end).sum()

    def _arguments(self, params: Tree, grads: Tree, hidden: Tree, th: Tree) -> tuple[Tree, ...]:
        return (self.opt_params if th is None else th, params, grads, hidden)

    def _draw(self, leaf: int, t: int, shape: Sequence[int]) -> Tensor:
        # Drawn by numpy: `vmap` refuses torch's random operations, even of constants.
        x = numpy.random.default_rng([self.seed, leaf, t]).standard_normal(tuple(shape))
        return torch.as_tensor(x, dtype=torch.float64)


def smooth_loss(params: Tree, targets: tuple[Tensor, ...]) -> Tensor:
    """A loss with derivatives of every order, other for every coordinate."""
    terms = [
        (0.5 * (p - t).square() + 0.3 * torch.sin(p + t)).sum()
        for p, t in zip(trees.leaves(params), targets, strict=True)
    ]
    return torch.stack(terms).sum()


def floating(*roots: Tree) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], Any]]:
    """The floating tensors of some trees, and what puts others into their places."""
    flat, spec = trees.flatten(roots)
    at = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.is_floating_point()]

    def rebuilt(tensors: Sequence[Tensor]) -> Any:
        full = list(flat)
        for i, x in zip(at, tensors, strict=True):
            full[i] = x
        return trees.unflatten(spec, full)

    return tuple(flat[i] for i in at), rebuilt


def reversed_keys(tree: Tree) -> Tree:
    """The tree with every dict built in reverse order."""
    if isinstance(tree, dict):
        return {k: reversed_keys(v) for k, v in reversed(list(tree.items()))}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(reversed_keys, tree))
    return type(tree)(map(reversed_keys, tree)) if isinstance(tree, (list, tuple)) else tree


def _moved(tree: Tree, device: Any) -> Tree:
    return trees.map(functools.partial(_to, device=device), tree)


def _to(x: Any, device: Any) -> Any:
    return x.to(device) if isinstance(x, Tensor) and device is not None else x
