"""Which rule an adapter runs: found by name or file, its weights checked and named by a hash."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import _files, optimizers, pretrained, trees
from fmeta.optimizer import Optimizer, check_optimizer_type
from fmeta.pretrained._finite import check_finite

__all__ = ["Rule", "find_rule"]

Tree = Any


class Rule(NamedTuple):
    """A rule with its weights.

    Attributes:
        optimizer: the rule.
        opt_params: its weights, a copy.
        name: of its builder or file, ``"custom"`` for an optimizer that was given as such.
        digest: SHA-256 over paths, shapes, dtypes and bytes of the weights.
        like: the parameter tree, without values, for builders that take it.
    """

    optimizer: Optimizer
    opt_params: Tree
    name: str
    digest: str
    like: Tree = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Rule:
        return self  # nothing in it is ever changed

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name == "custom":
            raise TypeError(
                "an optimizer made of functions cannot be pickled: save opt.state_dict(), or give "
                "LearnedOptimizer the name of a rule or a file of weights"
            )
        return _again, (self.name, self.opt_params, self.like)


def find_rule(source: Any, opt_params: Tree, like: Callable[[], Tree]) -> Rule:
    """The rule of a name, a file or an `Optimizer`, with ``opt_params`` or its own weights.

    Args:
        source: what the user gave.
        opt_params: weights, or None for those of the file or of ``init()``.
        like: gives the parameter tree, for builders that take it.

    Raises:
        TypeError: for anything else, such as an optimizer of torch.
        ValueError: for an unknown name, or weights that are not those of the rule, or not finite.
        FileNotFoundError: no such file.
    """
    name = "custom"
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        with _values_are_made():
            optimizer, own = _named(name, like)
    else:
        if isinstance(source, torch.optim.Optimizer) or (
            isinstance(source, type) and issubclass(source, torch.optim.Optimizer)
        ):
            kind = source if isinstance(source, type) else type(source)
            near = kind.__name__.lower()
            known = near if near in optimizers.BUILDERS else "adamw"
            raise TypeError(
                f"torch.optim.{kind.__name__} is no pure function: use it as it is, or give the "
                f"name of a rule, such as {known!r}"
            )
        check_optimizer_type(source, "name_or_optimizer")
        optimizer, own = source, None
    if own is None:
        with _values_are_made():
            own = optimizer.init()
    if opt_params is None:
        opt_params = own
    else:
        _check(name, own, opt_params)
    weights = trees.map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, opt_params)
    for path, x in zip(trees.paths(weights), trees.leaves(weights), strict=True):
        if type(x) in (Tensor, torch.nn.Parameter) and x.is_floating_point():
            check_finite(x, f"opt_params at path {path}")
    shapes = None
    if name in optimizers.BUILDERS and _takes_params(optimizers.BUILDERS[name]):
        shapes = trees.map(
            lambda p: None if p is None else torch.empty(p.shape, dtype=p.dtype, device="meta"),
            like(),
        )
    return Rule(optimizer, weights, name, digest(weights), shapes)


def _values_are_made() -> Any:
    """Where a model is built without values, ``with torch.device("meta")``, weights have some."""
    no_values = torch.get_default_device().type == "meta"
    return torch.device("cpu") if no_values else contextlib.nullcontext()


def digest(tree: Tree) -> str:
    """SHA-256 of a tree's paths, shapes, dtypes and values, in hexadecimal digits."""
    sha = hashlib.sha256()
    for path, x in sorted(_files.by_path(tree).items()):
        if not isinstance(x, Tensor):
            sha.update(f"{path}|{x!r};".encode())
            continue
        sha.update(f"{path}|{tuple(x.shape)}|{x.dtype}|".encode())
        if x.device.type != "meta" and type(x) in (Tensor, torch.nn.Parameter):  # has values
            flat = x.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _named(name: str, like: Callable[[], Tree]) -> tuple[Optimizer, Tree | None]:
    if name in optimizers.BUILDERS:
        builder: Callable[..., Optimizer] = optimizers.BUILDERS[name]
        return builder(like()) if _takes_params(builder) else builder(), None
    if os.sep in name or "/" in name or Path(name).suffix or Path(name).exists():
        return pretrained.load(name)
    try:
        optimizers.get(name)
    except ValueError as error:
        raise ValueError(f"{error}; a file of weights is given by its path") from None
    raise AssertionError


def _takes_params(builder: Callable[..., Optimizer]) -> bool:
    parameters = inspect.signature(builder).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in kinds for p in parameters)


def _again(name: str, opt_params: Tree, like: Tree) -> Rule:
    return find_rule(name, opt_params, lambda: like)


def _check(name: str, own: Tree, opt_params: Tree) -> None:
    what = "opt_params" if name == "custom" else f"opt_params of {name}"
    try:
        trees.match(own, opt_params, what, allow_none=False)
    except ValueError as error:
        raise ValueError(
            f"{error}; give weights of this rule, built with the sizes that they have, or None for "
            "its init()"
        ) from None
