"""The leaves of one update, matched and checked, and what goes wrong with them explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.optimizer import Hidden, check_grads, check_params

__all__ = [
    "RULE_ERRORS",
    "Leaves",
    "check_first_state",
    "check_state",
    "per_leaf",
    "settled",
    "start_leaves",
    "told_of_weights",
]

Tree = Any

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

    With ``states_later`` the caller looks at the states itself (`check_states`, `check_column`):
    with a thousand leaves that is cheaper group by group.
    """

    def __init__(
        self, model_params: Tree, grads: Tree, hidden: Any, *, states_later: bool = False
    ) -> None:
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
        self._grouped: tuple[Any, list[list[int]]] | None = None
        for i in self.active:
            if self.grads[i].device != self.params[i].device:
                raise self._elsewhere(i, "gradient", self.grads[i].device)
        if not states_later:
            self.check_states(self.active, shapes=False)

    def groups(self, limits: Mapping[str, int]) -> list[list[int]]:
        """The active leaves as `trees.shape_classes` has them; the same ones for a second pass."""
        if self._grouped is None or self._grouped[0] is not limits:
            candidates: list[Any] = [None] * len(self.params)
            for i in self.active:
                candidates[i] = self.params[i]
            self._grouped = (limits, trees.shape_classes(candidates, **limits))
        return self._grouped[1]

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """Parameter and gradient of leaf i in the compute dtype."""
        p, g = self.params[i], self.grads[i]
        dtype = trees.compute_dtype(p)
        if p.dtype is dtype and g.dtype is dtype:
            return p, g  # a `.to` costs as much as a small operation
        return p.to(dtype), g.to(dtype)

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

    def check_states(
        self, leaves: Sequence[int], *, shapes: bool = True, scalars: bool = True
    ) -> None:
        """Raises unless the states of these leaves fit their parameters.

        They are on the same device and, with ``shapes``, have the parameter's shape, up to further
        axes at the end. Scalars (counts) are fine where ``scalars``.
        """
        for i in leaves:
            param = self.params[i]
            for k, x in self.states[i].items():
                if not isinstance(x, Tensor):
                    continue
                if x.device != param.device:
                    raise self._elsewhere(i, f"hidden state's {k!r}", x.device)
                if shapes and not _fits(x.shape, param.shape, scalars):
                    raise ValueError(
                        f"the hidden state's {k!r} at path {trees.paths(self.model_params)[i]} has "
                        f"shape {tuple(x.shape)}, but the parameter there has shape "
                        f"{tuple(param.shape)}: it is the state of other parameters; {_RESTART}"
                    )

    def check_column(
        self, leaves: Sequence[int], params: Tensor, column: Tensor, *, shapes: bool = True
    ) -> None:
        """The same for one entry of the states of some leaves, which was stacked.

        Args:
            params: ``(B, *leaf)``.
            column: ``(B, *entry)``.
        """
        fits = not shapes or _fits(column.shape[1:], params.shape[1:], True)
        if not fits or column.device != params.device:
            self.check_states(leaves, shapes=shapes)

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
        better = _other_weights(init, opt_params)
        if better is not None:
            return better
        if not isinstance(error, KeyError) or not error.args:
            return error
        key = error.args[0]
        if fresh is not None and key not in fresh():
            return error  # a key of something that the rule itself holds
        return self.missing(key)

    def unfit(self, group: Sequence[int], fresh: Mapping[str, Any]) -> ValueError | None:
        """The error for leaves whose state is that of a parameter of another shape or dtype.

        Args:
            group: leaves of one shape.
            fresh: a state such as the rule starts with.
        """
        for i in group:
            for key, want in fresh.items():
                x = self.states[i].get(key)
                if isinstance(want, Tensor) and isinstance(x, Tensor):
                    # A rule may make a floating number of an integer that it starts with.
                    floating = x.is_floating_point() and want.is_floating_point()
                    if x.shape == want.shape and (x.dtype == want.dtype or not floating):
                        continue
                    path = trees.paths(self.model_params)[i]
                    return ValueError(
                        f"the hidden state at path {path} holds {key!r} of shape {tuple(x.shape)}, "
                        f"{x.dtype}, but for the parameter there, of shape "
                        f"{tuple(self.params[i].shape)}, {self.params[i].dtype}, it has shape "
                        f"{tuple(want.shape)}, {want.dtype}: {_RESTART}"
                    )
        return None

    def missing(self, key: Any) -> ValueError:
        """The error for a rule that found no entry ``key`` where it looked for one."""
        i = self.active[0]
        held = ", ".join(map(str, self.states[i])) or "nothing"
        return ValueError(
            f"this optimizer looked for {key!r} and did not find it: the hidden state at path "
            f"{trees.paths(self.model_params)[i]} holds {held}, as if of another optimizer: "
            f"{_RESTART}"
        )


def _other_weights(init: Callable[..., Tree], opt_params: Tree) -> ValueError | None:
    """The error for weights that are not those of the rule with this ``init``; None if they are."""
    try:
        own = _outside(init)
    except Exception:  # it needs what is not at hand here
        return None
    want, got = _shapes(own), _shapes(opt_params)
    if want == got:
        return None
    return ValueError(
        f"opt_params do not fit this optimizer: it learns {_listed(want)}, got {_listed(got)}: "
        "give what its init() returns"
    )


def told_of_weights(init: Callable[..., Tree], opt_params: Tree, fn: Callable[[], Any]) -> Any:
    """``fn()``, with a better error where it dies of weights of another rule."""
    try:
        return fn()
    except RULE_ERRORS as error:
        better = _other_weights(init, opt_params)
        if better is None:
            raise
        raise better from error


def _outside(init: Callable[..., Tree]) -> Tree:
    """``init(None)`` outside transforms, some of which forbid to draw: they are of one thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(init, None).result()


def _fits(shape: torch.Size, param: torch.Size, scalars: bool) -> bool:
    return shape == param or (scalars and not shape) or shape[: len(param)] == param


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
        states.append(settled(check_first_state(state), dtype, param.device))
    return trees.unflatten(spec, states)


def settled(state: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """A rule's first state, in the compute dtype and on the parameter's device."""
    return trees.map(lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), state)


def check_first_state(state: Any) -> dict[str, Any]:
    """Raises a TypeError unless what a rule's ``init_hidden`` gave is a dict of tensors."""
    check_state(state, "init_hidden")
    for i, x in enumerate(trees.leaves(state)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"the rule's init_hidden gives hidden[{trees.paths(state)[i]!r}] = {x!r}: a hidden "
                "state holds tensors only (a count is torch.zeros((), dtype=torch.int64))"
            )
    return state


def check_state(state: Any, where: str) -> dict[str, Any]:
    """Raises a TypeError unless a rule's own state is a dict of tensors."""
    if not isinstance(state, dict):
        raise TypeError(
            f"the rule's {where} must give a dict of tensors as hidden state, got "
            f"a {type(state).__name__}"
        )
    return state


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
