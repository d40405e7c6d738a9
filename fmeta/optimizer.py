"""The optimizer type: pure functions over parameter trees."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fmeta import trees
from fmeta._numbers import is_whole
from fmeta.random import own

__all__ = ["Hidden", "Optimizer", "apply_updates", "optimizer_from_step"]

Tree = Any


class Hidden(NamedTuple):
    """The state of an optimizer, split so that it can follow its parameters.

    Attributes:
        leaves: a tree shaped like the model's parameters with a dict of tensors at each leaf.
        shared: a dict of tensors that belong to the whole model (a schedule's ``t``, ...).
    """

    leaves: Any
    shared: dict[str, Any]


def _same_params(opt_params: Tree, model_params: Tree, hidden: Tree) -> Tree:
    return model_params


class Optimizer(NamedTuple):
    """An optimizer, hand-made or learned, as pure functions.

    Attributes:
        init: ``init(generator=None) -> opt_params``, what the optimizer learns.
        init_hidden: ``init_hidden(opt_params, model_params, *, num_steps=None) -> hidden``.
        update: ``update(opt_params, model_params, grads, hidden, *, loss=None, extras=None) ->
            (delta, hidden)``; ``delta`` is shaped like the parameters, ``None`` at leaves that
            stay as they are.
        needs: names of what `update` cannot do without, of ``{"loss", "num_steps", ...}``; any
            name but these two is looked up in ``extras``.
        eval_params: ``eval_params(opt_params, model_params, hidden) -> model_params``, the
            parameters to evaluate with (averaging and schedule-free rules differ).
        reads_grads: False for a rule whose update does not depend on the values of the gradients
            (only on which are None): inner training gives it zeros and saves the backward pass.
    """

    init: Callable[..., Tree]
    init_hidden: Callable[..., Tree]
    update: Callable[..., tuple[Tree, Tree]]
    needs: frozenset[str] = frozenset()
    eval_params: Callable[[Tree, Tree, Tree], Tree] = _same_params
    reads_grads: bool = True

    def step(
        self,
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Tree,
        *,
        loss: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> tuple[Tree, Tree]:
        """One update of the model's parameters.

        Args:
            opt_params: what the optimizer learned, as `init` returns it.
            model_params: tree of floating tensors.
            grads: tree shaped like ``model_params``; ``None`` where there is no gradient.
            hidden: the optimizer's state, as `init_hidden` returns it.
            loss: scalar loss at ``model_params``, for rules that need it.
            extras: further inputs by the names of ``needs``.

        Returns:
            ``(model_params, hidden)``: ``model_params + delta``, computed in the compute dtype
            and cast to the dtype of each parameter once; leaves without gradient are returned as
            they are, with their hidden state.

        Raises:
            ValueError: when the trees do not match (with path and shapes), or when something that
                the rule needs is missing (with its name).
            TypeError: when a parameter is not a floating tensor.
        """
        check_needs(self.needs, loss, extras)
        check_params(model_params)
        found = check_grads(model_params, grads)
        if not isinstance(hidden, Hidden) and any(g is None for g in found):
            raise ValueError(
                f"there is no gradient (None) at path {trees.paths(grads)[found.index(None)]}, and "
                f"the hidden state is a {type(hidden).__name__}, which cannot be split by "
                "parameter: let `init_hidden` return fmeta.optimizer.Hidden(leaves, shared), or "
                "give zeros as the gradient"
            )
        delta, hidden = self.update(
            opt_params, model_params, grads, hidden, loss=loss, extras=extras
        )
        return apply_updates(model_params, delta), hidden


def apply_updates(model_params: Tree, delta: Tree) -> Tree:
    """``model_params + delta``, added in the compute dtype and cast to the parameter's dtype once.

    Args:
        model_params: tree of floating tensors.
        delta: tree of the same shapes, ``None`` at leaves that stay as they are.

    Raises:
        ValueError: with the path of the first leaf of ``delta`` that does not match.
    """
    flat, spec = trees.flatten(model_params)
    changes = trees.match(model_params, delta, "the optimizer's delta")
    return trees.unflatten(
        spec, [_add(param, change) for param, change in zip(flat, changes, strict=True)]
    )


def optimizer_from_step(
    init: Callable[..., Tree],
    init_hidden: Callable[..., Tree],
    step: Callable[..., tuple[Tree, Tree]],
    *,
    needs: frozenset[str] = frozenset(),
) -> Optimizer:
    """An `Optimizer` from a hand-written ``step`` (``update`` becomes new minus old parameters).

    Args:
        init: ``init(generator) -> opt_params``.
        init_hidden: ``init_hidden(opt_params, model_params[, num_steps=]) -> hidden``, any tree.
        step: ``step(opt_params, model_params, grads, hidden[, loss=, extras=]) ->
            (model_params, hidden)``. Keywords that it does not name are not passed.
        needs: names of what ``step`` cannot do without.

    Example:
        >>> import torch
        >>> descend = lambda a, p, g, h: ({k: p[k] - a * g[k] for k in p}, h)
        >>> rule = optimizer_from_step(lambda g: torch.tensor(0.5), lambda a, p: {}, descend)
        >>> p = {"w": torch.ones(2)}
        >>> rule.step(rule.init(), p, p, rule.init_hidden(rule.init(), p))[0]
        {'w': tensor([0.5000, 0.5000])}
    """
    step_keywords = _accepted(step, ("loss", "extras"))
    hidden_keywords = _accepted(init_hidden, ("num_steps",))

    needs = as_needs(needs)

    def start(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Tree:
        check_params(model_params)
        check_num_steps(needs, num_steps)
        return init_hidden(
            opt_params, model_params, **({"num_steps": num_steps} if hidden_keywords else {})
        )

    def update(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Tree,
        *,
        loss: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> tuple[Tree, Tree]:
        given = {"loss": loss, "extras": extras}
        new, hidden = step(
            opt_params, model_params, grads, hidden, **{k: given[k] for k in step_keywords}
        )
        flat, spec = trees.flatten(model_params)
        after = trees.match(model_params, new, "the parameters that `step` returned")
        delta = [_subtract(a, b) for a, b in zip(after, flat, strict=True)]
        return trees.unflatten(spec, delta), hidden

    return Optimizer(lambda generator=None: init(own(generator)), start, update, needs)


def check_optimizer_type(value: Any, what: str) -> None:
    """Raises a TypeError that names the cure unless ``value`` is an `Optimizer`."""
    if isinstance(value, Optimizer):
        return
    if callable(value) and hasattr(value, "__name__"):
        cure = f"call the builder: {value.__name__}(...)"
    elif hasattr(value, "param_groups"):
        cure = "objects of torch.optim are no pure functions; use one of fmeta.optimizers"
    else:
        cure = "build one with fmeta.optimizers, or make one with fmeta.optimizer_from_step"
    raise TypeError(f"{what} must be an fmeta.Optimizer, got {type(value).__name__}: {cure}")


def as_needs(needs: Iterable[str]) -> frozenset[str]:
    """The names as a frozenset; a single string would be taken for its letters."""
    if isinstance(needs, str):
        raise TypeError(f"needs must be a set of names, got a string: give {{{needs!r}}}")
    return frozenset(needs)


def check_grads(model_params: Tree, grads: Tree) -> list[Any]:
    """Leaves of the gradient tree, matched with the parameters and of floating dtype."""
    found = trees.match(model_params, grads, "the gradient")
    for i, g in enumerate(found):
        if g is not None and not g.is_floating_point():
            raise TypeError(
                f"the gradient at path {trees.paths(grads)[i]} is {g.dtype}, not a floating "
                "tensor: cast it, or give None where there is no gradient"
            )
    return found


def check_params(model_params: Tree, *, allow_none: bool = True) -> None:
    """Raises unless every leaf is a floating tensor (or None), all on one device."""
    device = None
    for i, leaf in enumerate(trees.leaves(model_params)):
        if leaf is None and allow_none:
            continue
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"the parameter at path {trees.paths(model_params)[i]} is {kind}, not a floating "
                "tensor: keep integers, flags and buffers out of the parameters (put them into "
                "`model_state`, `loss_args` or the batch)"
            )
        if device is None:
            device = leaf.device
        elif leaf.device != device:
            trees.common_device(model_params)


def check_needs(
    needs: frozenset[str], loss: Tensor | None, extras: Mapping[str, Any] | None
) -> None:
    """Raises a ValueError that names what of ``needs`` was not given."""
    if not needs:
        return
    if "loss" in needs and loss is None:
        raise ValueError(
            "this optimizer needs the loss: call step(..., loss=loss) with the scalar at "
            "model_params (fmeta.unroll does so by itself)"
        )
    missing = sorted(needs - {"loss", "num_steps"} - set(extras or ()))
    if missing:
        raise ValueError(
            f"this optimizer needs {', '.join(missing)}: pass extras={{{missing[0]!r}: ...}} to "
            "step, update or unroll (there with a leading dimension T, or as a function of the "
            "parameters: extras(params, batch, *loss_args) -> dict)"
        )


def check_num_steps(needs: frozenset[str], num_steps: Any) -> None:
    """Raises a ValueError when the horizon is no such number, or needed and not given."""
    wrong = not isinstance(num_steps, Tensor) and (not is_whole(num_steps) or num_steps < 1)
    if num_steps is not None and wrong:
        raise ValueError(f"num_steps must be a positive integer, got {num_steps!r}")
    if isinstance(num_steps, Tensor) and num_steps.ndim:
        raise ValueError(
            f"num_steps must be a scalar, got a tensor of shape {tuple(num_steps.shape)}: for one "
            "horizon a task use vmap"
        )
    if "num_steps" in needs and num_steps is None:
        raise ValueError(
            "this optimizer needs num_steps, the number of steps it will be run for: call "
            "init_hidden(opt_params, model_params, num_steps=...)"
        )


def _add(param: Tensor | None, change: Tensor | None) -> Tensor | None:
    if param is None or change is None:
        return param
    dtype = trees.compute_dtype(param)
    if param.dtype is dtype and change.dtype is dtype:
        return param + change  # a `.to` costs as much as a small addition
    return (param.to(dtype) + change.to(dtype)).to(param.dtype)


def _subtract(after: Tensor | None, before: Tensor | None) -> Tensor | None:
    if after is None or before is None:
        return None
    dtype = trees.compute_dtype(before)
    return after.to(dtype) - before.to(dtype)


def _accepted(fn: Callable[..., Any], keywords: tuple[str, ...]) -> tuple[str, ...]:
    parameters = inspect.signature(fn).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return keywords
    return tuple(k for k in keywords if k in parameters)
