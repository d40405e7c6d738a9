"""`tensorwise`: an optimizer from a rule that sees one parameter tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fmeta import trees
from fmeta._leaves import check_state
from fmeta._lift import lift
from fmeta.functional import functionalize, moved
from fmeta.optimizer import Optimizer
from fmeta.random import own

__all__ = ["tensorwise"]

Tree = Any
Accumulators = tuple[Callable[..., dict[str, Tensor]], Callable[..., dict[str, Tensor]]]


def tensorwise(
    rule: Any,
    *,
    accumulators: Accumulators | None = None,
    features: Callable[..., Tensor] | None = None,
    post: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Optimizer:
    """Lifts a rule of one tensor to parameter trees.

    Small tensors of one shape are updated together, under `vmap`.

    Args:
        rule: either an object with

            - ``init(generator) -> opt_params``;
            - ``init_hidden(opt_params, param: (*leaf)) -> dict`` of tensors;
            - ``update(opt_params, param, grad, hidden) -> (delta: (*leaf), hidden)``, or
              ``step(...) -> (param: (*leaf), hidden)``;
            - optionally ``needs``: then ``update`` also gets ``loss=`` and ``extras=``, and with
              ``"num_steps"`` in it ``init_hidden`` gets ``num_steps=``;

            or an `nn.Module`, applied to the features of every coordinate.
        accumulators: for a module: ``(init, update)`` with ``init(param) -> dict`` and
            ``update(param, grad, hidden) -> dict``. Default: none.
        features: for a module: ``features(param, grad, hidden) -> (*leaf, F)``; ``hidden`` holds
            the accumulators after this gradient.
        post: ``post(delta, param) -> delta``, of shape ``(*leaf)``: normalise, orthogonalise,
            scale. Also for a rule object.

    Returns:
        An `Optimizer`; with a module, ``opt_params`` are the module's parameters as they stand, and
        the delta before ``post`` is its first output.

    Raises:
        TypeError: when the rule lacks a function, or a module comes without ``features``.

    Example:
        >>> import torch
        >>> class SignDescent:
        ...     init = staticmethod(lambda generator: {"lr": torch.tensor(0.1)})
        ...     init_hidden = staticmethod(lambda th, p: {})
        ...     update = staticmethod(lambda th, p, g, h: (-th["lr"] * g.sign(), h))
        >>> sign = tensorwise(SignDescent, post=lambda d, p: d / (1 + p.norm()))
        >>> p = [torch.zeros(2)]
        >>> sign.step(sign.init(), p, [torch.ones(2)], sign.init_hidden(sign.init(), p))[0]
        [tensor([-0.1000, -0.1000])]
    """
    if isinstance(rule, nn.Module):
        rule = _NetRule(rule, accumulators, features)
    elif accumulators is not None or features is not None:
        raise TypeError("accumulators and features go with an nn.Module, not with a rule object")
    needs = frozenset(getattr(rule, "needs", ()))
    change = delta_of(rule)
    init, init_hidden = required(rule, "init"), required(rule, "init_hidden")

    def update_leaf(th: Tree, p: Tensor, g: Tensor, h: dict[str, Any], **extra: Any) -> Any:
        delta, h = change(th, p, g, h, **extra)
        check_delta(delta, p)
        return (delta if post is None else post(delta, p)), check_state(h, "update")

    keywords = () if not needs else ("loss", "extras")
    return lift(
        fresh(init),
        init_hidden,
        update_leaf,
        needs=needs,
        leaf_keywords=keywords + (("num_steps",) if "num_steps" in needs else ()),
    )


class _NetRule:
    """A module as the shared net over features of one tensor."""

    def __init__(
        self,
        module: nn.Module,
        accumulators: Accumulators | None,
        features: Callable[..., Tensor] | None,
    ) -> None:
        if features is None:
            raise TypeError(
                "tensorwise(module) needs features(param, grad, hidden) -> (*leaf, F); for "
                "features of one coordinate alone use coordinatewise(module)"
            )
        self.apply, self.params, self.buffers = functionalize(module)
        self.features = features
        none: Accumulators = (lambda p: {}, lambda p, g, h: h)
        self.start, self.accumulate = accumulators or none

    def init(self, generator: Any) -> Tree:
        return dict(self.params)

    def init_hidden(self, th: Tree, p: Tensor) -> dict[str, Tensor]:
        return self.start(p)

    def update(self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor]) -> Any:
        h = self.accumulate(p, g, h)
        buffers = trees.cast(moved(self.buffers, p.device), p.dtype)
        out = self.apply(th, buffers, self.features(p, g, h))
        return out.select(-1, 0), h


def fresh(init: Callable[..., Tree]) -> Callable[..., Tree]:
    """A rule's ``init`` as an optimizer's: a generator of its own, and copies of what it keeps."""

    def copies(generator: torch.Generator | None = None) -> Tree:
        return trees.map(lambda x: x.clone() if isinstance(x, Tensor) else x, init(own(generator)))

    return copies


def required(rule: Any, name: str) -> Callable[..., Any]:
    """The rule's function of that name, or a TypeError that says what a rule consists of."""
    fn = getattr(rule, name, None)
    if fn is None:
        raise TypeError(
            f"the rule {rule!r} has no {name}: a rule is an object with init(generator), "
            "init_hidden(opt_params, param) and step(opt_params, param, grad, hidden) -> (param, "
            "hidden), or update(...) -> (delta, hidden)"
        )
    return fn


def delta_of(rule: Any) -> Callable[..., tuple[Tensor, Any]]:
    """The rule's ``update``, or its ``step`` turned into one."""
    if hasattr(rule, "update"):

        def checked(*args: Any, **extra: Any) -> tuple[Tensor, Any]:
            return pair(rule.update(*args, **extra), "update", "(delta, hidden)")

        return checked
    step = required(rule, "step")

    def update(th: Tree, p: Tensor, g: Tensor, h: Any, **extra: Any) -> tuple[Tensor, Any]:
        new, h = pair(step(th, p, g, h, **extra), "step", "(param, hidden)")
        return new - p, h

    return update


def pair(result: Any, name: str, wanted: str) -> tuple[Tensor, Any]:
    """The pair a rule returned, or a ValueError that says what it should be."""
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
        got = (
            f"({', '.join(type(x).__name__ for x in result)})"
            if isinstance(result, tuple)
            else f"a {type(result).__name__}"
        )
        raise ValueError(f"the rule's {name} must return {wanted}, got {got}")
    return result


def check_delta(delta: Any, param: Tensor) -> None:
    """Raises a ValueError unless a rule returned something of its parameter's shape."""
    if not isinstance(delta, Tensor) or delta.shape != param.shape:
        got = tuple(delta.shape) if isinstance(delta, Tensor) else type(delta).__name__
        raise ValueError(
            f"the rule returned {got} for a parameter of shape {tuple(param.shape)}: it must "
            "return a tensor of the parameter's own shape"
        )
