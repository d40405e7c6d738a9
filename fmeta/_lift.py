"""Lifts a rule of one tensor to a whole parameter tree, batched over leaves of one shape.

What every optimizer of the library shares: matching of trees, compute dtype, leaves without a
gradient, and grouping. Small leaves of one shape and dtype are stacked and updated at once; a large
leaf, or one that is alone with its shape, is updated as it is, without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.optimizer import (
    Hidden,
    Optimizer,
    check_grads,
    check_needs,
    check_num_steps,
    check_params,
)

__all__ = ["Leaves", "lift", "per_leaf"]

Tree = Any

# Measured on a CPU (adam, with and without a gradient): 2 stacked leaves cost what 2 single ones
# do, 4 cost two thirds, 16 a third; above 2**13 elements the copies cost more than the calls saved.
_MAX_STACKED_NUMEL = 2**13
_MIN_STACK = 4


# What a rule dies of when its weights or its state are not its own.
RULE_ERRORS = (KeyError, IndexError, TypeError, AttributeError, RuntimeError)
_RESTART = "take the hidden state from this optimizer's init_hidden(opt_params, model_params)"


class Leaves:
    """The leaves of one update: parameters, gradients and states, matched and checked.

    Attributes:
        spec: structure of the parameter tree.
        params, grads: leaves in their own dtype (``None`` where absent).
        states: the dict of hidden tensors at each leaf.
        active: indices of the leaves that have a gradient.
    """

    def __init__(self, model_params: Tree, grads: Tree, hidden: Any) -> None:
        if not isinstance(hidden, Hidden):
            raise ValueError(
                f"the hidden state is a {type(hidden).__name__}, not what this optimizer's "
                f"init_hidden returns: {_RESTART}"
            )
        check_params(model_params)
        self.params, self.spec = trees.flatten(model_params)
        self.grads = check_grads(model_params, grads)
        self.states = trees.flatten_up_to(
            self.spec, hidden.leaves, model_params, "the hidden state"
        )
        self.active = [
            i
            for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True))
            if p is not None and g is not None
        ]
        self.model_params = model_params
        for i in self.active:
            device = self.params[i].device
            if self.grads[i].device != device:
                raise self._elsewhere(i, "gradient", self.grads[i].device)
            for k, x in self.states[i].items():
                if isinstance(x, Tensor) and x.device != device:
                    raise self._elsewhere(i, f"hidden state's {k!r}", x.device)

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """Parameter and gradient of leaf i in the compute dtype."""
        dtype = trees.compute_dtype(self.params[i])
        return self.params[i].to(dtype), self.grads[i].to(dtype)

    def tree(self, values: Sequence[Any]) -> Tree:
        return trees.unflatten(self.spec, values)

    def weights(self, opt_params: Tree, dtype: torch.dtype) -> Tree:
        """``opt_params`` in the compute dtype; scalars are moved to the device, arrays are not."""
        flat, spec = trees.flatten(opt_params)
        device = self.params[self.active[0]].device
        for j, x in enumerate(flat):
            if isinstance(x, Tensor) and x.ndim and x.device != device:
                raise ValueError(
                    f"opt_params at path {trees.paths(opt_params)[j]} are on {x.device}, but the "
                    f"parameters are on {device}: move them there, for example by "
                    "fmeta.trees.map(lambda x: x.to(device), opt_params)"
                )
        return trees.unflatten(
            spec,
            [
                x.to(device, dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
                for x in flat
            ],
        )

    def check_shapes(self, *, scalars: bool = True) -> None:
        """Raises unless every state has the shape of its parameter, up to further axes at the end.

        Scalars (counts) are fine where ``scalars``.
        """
        for i in self.active:
            shape = self.params[i].shape
            for k, x in self.states[i].items():
                if not isinstance(x, Tensor) or x.shape == shape or (scalars and not x.ndim):
                    continue
                if x.shape[: len(shape)] != shape:
                    raise ValueError(
                        f"the hidden state's {k!r} at path {trees.paths(self.model_params)[i]} has "
                        f"shape {tuple(x.shape)}, but the parameter there has shape "
                        f"{tuple(shape)}: it is the state of other parameters; {_RESTART}"
                    )

    def _elsewhere(self, i: int, what: str, device: torch.device) -> ValueError:
        return ValueError(
            f"at path {trees.paths(self.model_params)[i]} the parameter is on "
            f"{self.params[i].device} and the {what} on {device}: move them to one device"
        )

    def explained(
        self,
        error: Exception,
        init: Callable[..., Tree],
        opt_params: Tree,
        fresh: Callable[[], Mapping[str, Any]] | None = None,
    ) -> Exception:
        """What to raise for an error inside a rule: weights or a state of another, or itself.

        ``fresh`` gives a state such as the rule starts with.
        """
        try:
            own = init(None)
        except Exception:  # under a transform that forbids drawing, say
            own = opt_params
        want, got = _shapes(own), _shapes(opt_params)
        if want != got:
            return ValueError(
                f"opt_params do not fit this optimizer: it learns {_listed(want)}, got "
                f"{_listed(got)}: give what its init() returns"
            )
        if not isinstance(error, KeyError) or not error.args:
            return error
        key = error.args[0]
        if fresh is not None and key not in fresh():
            return error  # a key of something that the rule itself holds
        return self.missing(key)

    def missing(self, key: Any) -> ValueError:
        """The error for a rule that found no entry ``key`` where it looked for one."""
        i = self.active[0]
        held = ", ".join(map(str, self.states[i])) or "nothing"
        return ValueError(
            f"this optimizer looked for {key!r} and did not find it: the hidden state at path "
            f"{trees.paths(self.model_params)[i]} holds {held}, as if of another optimizer: "
            f"{_RESTART}"
        )


def _shapes(tree: Tree) -> dict[str, Any]:
    return {
        path: tuple(x.shape) if isinstance(x, Tensor) else x
        for path, x in zip(trees.paths(tree), trees.leaves(tree), strict=True)
    }


def _listed(shapes: dict[str, Any]) -> str:
    return ", ".join(f"{path} {shape}" for path, shape in shapes.items()) or "nothing"


def start_leaves(
    init_leaf: Callable[..., dict[str, Any]], opt_params: Tree, model_params: Tree
) -> Tree:
    """A tree with ``init_leaf(opt_params, param)`` at each leaf, in the compute dtype."""
    check_params(model_params)
    flat, spec = trees.flatten(model_params)
    states: list[dict[str, Any]] = []
    for param in flat:
        if param is None:
            states.append({})
            continue
        dtype = trees.compute_dtype(param)
        state = init_leaf(trees.cast(opt_params, dtype), param.to(dtype))
        states.append(settled(check_state(state, "init_hidden"), dtype, param.device))
    return trees.unflatten(spec, states)


def settled(state: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """A rule's first state, in the compute dtype and on the parameter's device."""
    return trees.map(
        lambda x: (
            x.to(device, dtype if x.is_floating_point() else x.dtype)
            if isinstance(x, Tensor)
            else x
        ),
        state,
    )


def check_state(state: Any, where: str) -> dict[str, Any]:
    """Raises a TypeError unless a rule's own state is a dict of tensors."""
    if not isinstance(state, dict):
        raise TypeError(
            f"the rule's {where} must give a dict of tensors as hidden state, got "
            f"a {type(state).__name__}"
        )
    return state


def lift(
    init: Callable[..., Tree],
    init_leaf: Callable[..., dict[str, Any]],
    update_leaf: Callable[..., tuple[Tensor, dict[str, Any]]],
    *,
    hypers: Callable[[Tree], Mapping[str, Any]] | None = None,
    elementwise: bool = False,
    stacked: bool = True,
    needs: frozenset[str] = frozenset(),
    leaf_keywords: tuple[str, ...] = (),
) -> Optimizer:
    """An `Optimizer` from a rule of one tensor.

    Args:
        init: ``init(generator=None) -> opt_params``.
        init_leaf: ``(opt_params, param[, num_steps=]) -> dict``, the state of one leaf.
        update_leaf: ``(opt_params, param, grad, state, **hypers[, loss=, extras=]) -> (delta,
            state)``. Under `vmap` over leaves, unless ``elementwise``.
        hypers: ``opt_params -> {name: value}``; a value is a number, a scalar tensor, or a tree
            shaped like the parameters, of which a rule gets its own leaf's.
        elementwise: the rule works element by element and by broadcasting only, so a stack of
            leaves needs no vmap.
        stacked: whether to stack leaves at all; a rule of one or two operations is cheaper without.
        needs: as in `Optimizer`.
        leaf_keywords: which of ``num_steps``, ``loss``, ``extras`` the leaf functions take.
    """
    update_keywords = tuple(k for k in leaf_keywords if k != "num_steps")

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_num_steps(needs, num_steps)
        extra = {"num_steps": num_steps} if "num_steps" in leaf_keywords else {}
        return Hidden(
            start_leaves(lambda th, p: init_leaf(th, p, **extra), opt_params, model_params), {}
        )

    def update(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Hidden,
        *,
        loss: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> tuple[Tree, Hidden]:
        check_needs(needs, loss, extras)
        at = Leaves(model_params, grads, hidden)
        if elementwise:
            at.check_shapes()
        given = {"loss": loss, "extras": extras}
        extra = {k: given[k] for k in update_keywords}
        named = {
            name: per_leaf(value, model_params, at.spec, name, like_params=elementwise)
            for name, value in (hypers(opt_params) if hypers else {}).items()
        }
        delta: list[Any] = [None] * len(at.params)
        states = list(at.states)
        weights: dict[torch.dtype, Tree] = {}
        members = set(at.active)
        candidates = [p if i in members else None for i, p in enumerate(at.params)]
        for group in trees.shape_classes(
            candidates, max_numel=_MAX_STACKED_NUMEL if stacked else -1, min_size=_MIN_STACK
        ):
            dtype = trees.compute_dtype(at.params[group[0]])
            if dtype not in weights:
                weights[dtype] = at.weights(opt_params, dtype)
            theta = weights[dtype]
            rows = [
                (
                    *at.pair(i),
                    at.states[i],
                    {k: _number(v[i], at.params[i]) for k, v in named.items()},
                )
                for i in group
            ]
            try:
                if len(group) == 1:
                    p, g, s, h = rows[0]
                    results = [update_leaf(theta, p, g, s, **h, **extra)]
                elif elementwise:
                    results = _broadcast_group(update_leaf, theta, rows, extra)
                else:
                    results = _vmap_group(update_leaf, theta, rows, extra)
            except RULE_ERRORS as error:
                started = functools.partial(_started, init_leaf, theta, at.pair(group[0])[0])
                raise at.explained(error, init, opt_params, started) from error
            for i, (d, s) in zip(group, results, strict=True):
                delta[i], states[i] = d, s
        return at.tree(delta), Hidden(at.tree(states), hidden.shared)

    return Optimizer(init, init_hidden, update, needs)


def per_leaf(
    value: Any, model_params: Tree, spec: Any, name: str, *, like_params: bool = True
) -> list[Any]:
    """A hyper-parameter for each leaf: the number itself, or what a tree holds at that leaf.

    With ``like_params``, what the tree holds must be a scalar or of the parameter's own shape.
    """
    count = spec.num_leaves
    if isinstance(value, (int, float)):
        return [value] * count
    if isinstance(value, Tensor):
        if value.ndim and not isinstance(model_params, Tensor):
            raise ValueError(
                f"{name} is a tensor of shape {tuple(value.shape)}: give a number, a scalar "
                "tensor, or a tree shaped like the parameters"
            )
        return [value] * count
    found = trees.flatten_up_to(spec, value, model_params, f"{name} (a tree)")
    if like_params:
        for i, (x, p) in enumerate(zip(found, trees.leaves(model_params), strict=True)):
            if isinstance(x, Tensor) and p is not None and x.ndim and x.shape != p.shape:
                raise ValueError(
                    f"{name} (a tree) at path {trees.paths(model_params)[i]} has shape "
                    f"{tuple(x.shape)}, but the parameter there has shape {tuple(p.shape)}: give "
                    "a number, a scalar tensor, or a tensor of the parameter's own shape"
                )
    return found


def _started(init_leaf: Callable[..., Any], theta: Tree, param: Tensor) -> Mapping[str, Any]:
    try:
        state = init_leaf(theta, param)
    except Exception:  # it needs what is not at hand here: then nothing can be said
        return {}
    return state if isinstance(state, dict) else {}


def _number(value: Any, like: Tensor) -> Any:
    """A hyper-parameter in the compute dtype of ``like``, on its device."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, trees.compute_dtype(like))


def _broadcast_group(
    update_leaf: Callable[..., Any], theta: Tree, rows: list[Any], extra: dict[str, Any]
) -> list[Any]:
    ndim = rows[0][0].ndim
    ones = (1,) * ndim

    def stack(xs: Sequence[Any]) -> Any:
        if all(x is xs[0] for x in xs) and not (isinstance(xs[0], Tensor) and xs[0].ndim):
            return xs[0]  # one number for all leaves
        out = _stack_numbers(xs, rows[0][0])
        return out.reshape(-1, *ones) if out.ndim == 1 else out

    ps, gs, states, hypers = zip(*rows, strict=True)
    columns = {k: torch.stack([s[k] for s in states]) for k in states[0]}
    scalars = {k for k, v in columns.items() if v.ndim == 1}
    delta, state = update_leaf(
        theta,
        torch.stack(ps),
        torch.stack(gs),
        {k: v.reshape(-1, *ones) if k in scalars else v for k, v in columns.items()},
        **{k: stack([h[k] for h in hypers]) for k in hypers[0]},
        **extra,
    )
    rows_out = {k: (v.reshape(-1) if k in scalars else v).unbind(0) for k, v in state.items()}
    return [(d, {k: v[i] for k, v in rows_out.items()}) for i, d in enumerate(delta.unbind(0))]


def _stack_numbers(values: Sequence[Any], param: Tensor) -> Tensor:
    """One hyper-parameter of several leaves; where some are scalars, they are spread out."""
    tensors = [x if isinstance(x, Tensor) else param.new_tensor(x) for x in values]
    if any(x.shape != tensors[0].shape for x in tensors):
        tensors = [x.expand(param.shape) for x in tensors]
    return torch.stack(tensors)


def _vmap_group(
    update_leaf: Callable[..., Any], theta: Tree, rows: list[Any], extra: dict[str, Any]
) -> list[Any]:
    ps, gs, states, hypers = zip(*rows, strict=True)
    shared = {k: hypers[0][k] for k in hypers[0] if all(h[k] is hypers[0][k] for h in hypers)}
    own = {k: _stack_numbers([h[k] for h in hypers], ps[0]) for k in hypers[0] if k not in shared}
    columns = [trees.leaves(s) for s in states]
    spec = trees.flatten(states[0])[1]
    stacked = [torch.stack(c) for c in zip(*columns, strict=True)]
    found: list[Any] = []

    def one(p: Tensor, g: Tensor, state: list[Tensor], own: dict[str, Tensor]) -> Any:
        delta, new = update_leaf(
            theta, p, g, trees.unflatten(spec, state), **shared, **own, **extra
        )
        leaves, new_spec = trees.flatten(new)
        found.append(new_spec)
        return delta, tuple(leaves)

    delta, flat = torch.vmap(one)(torch.stack(ps), torch.stack(gs), stacked, own)
    parts = [x.unbind(0) for x in flat]
    return [
        (d, trees.unflatten(found[0], [x[i] for x in parts])) for i, d in enumerate(delta.unbind(0))
    ]
