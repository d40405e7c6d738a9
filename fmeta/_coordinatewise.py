"""`coordinatewise`: one rule, shared by all coordinates of all parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fmeta import trees
from fmeta._chunks import binned, chunkable, is_observed
from fmeta._coordinate_tiles import in_tiles, tile_of
from fmeta._leafwise import consuming, leafwise
from fmeta._leaves import RULE_ERRORS, Leaves, check_first_state, check_state, settled
from fmeta._remat import remat
from fmeta._tensorwise import check_delta, delta_of, fresh, required
from fmeta.functional import functionalize, moved
from fmeta.optimizer import Hidden, Optimizer, check_needs, check_num_steps, check_params

__all__ = ["coordinatewise", "lift_coordinates"]

Tree = Any


def coordinatewise(
    rule: Any,
    features: Callable[[Tensor, Tensor], Tensor] | None = None,
    hidden: Any = None,
    *,
    chunk_size: int | None = None,
) -> Optimizer:
    """Lifts a rule of ONE coordinate to all coordinates of all leaves ("coordinate sharing").

    All coordinates of one dtype are laid side by side and the rule is vmapped over them once.

    Args:
        rule: either an object with

            - ``init(generator) -> opt_params``;
            - ``init_hidden(opt_params, param: ()) -> dict`` of tensors;
            - ``step(opt_params, param: (), grad: (), hidden) -> (param: (), hidden)``, or
              ``update(...) -> (delta: (), hidden)``;
            - optionally ``needs``: then ``step`` or ``update`` also gets ``loss=`` and
              ``extras=``, the same for all coordinates, and with ``"num_steps"`` in it
              ``init_hidden`` gets ``num_steps=``;

            or an `nn.Module` used as the shared network. It is read once, by `functionalize`; its
            parameters as they stand are what ``init`` returns.
        features: for a module: ``features(param: (), grad: ()) -> (F,)``; default
            ``torch.stack([grad, param])``.
        hidden: for a module: ``None``; or the size of its state, and the module is called as
            ``module(features, state) -> (out, state)`` with state ``(hidden,)``, zeros at first.
            `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell` work as they are (``out`` is their new
            ``h``). A tuple or dict of sizes gives a state of that structure.
        chunk_size: the most coordinates that are worked on at once (bounds the memory).

    Returns:
        An `Optimizer`: the delta is new minus old parameter, for a module ``out[..., 0]``. Its
        hidden state has at each leaf a dict of tensors ``(*leaf, *state)``; after an update those
        of all leaves of one dtype may be views of one buffer (clone the state of a small leaf
        that is to be kept alone). Where no derivative is recorded, coordinates of a large model
        are worked on a tile at a time, and ``rule`` is called once for each.

    Raises:
        TypeError: when the rule lacks a function or its state is not a dict.
        ValueError: when it returns anything but a scalar for a coordinate.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> rule = coordinatewise(net)                  # the article's [gradient, parameter] rule
        >>> rule.init()["weight"].shape
        torch.Size([1, 2])

    Reference:
        Andrychowicz et al. 1606.04474, section 2.1 ("coordinatewise").
    """
    if isinstance(rule, nn.Module):
        rule = _NetRule(rule, features, hidden)
    elif features is not None or hidden is not None:
        raise TypeError("features and hidden go with an nn.Module, not with a rule object")
    change, start = delta_of(rule), required(rule, "init_hidden")
    init = required(rule, "init")
    needs = frozenset(getattr(rule, "needs", ()))

    def start_coordinates(th: Tree, p: Tensor, **extra: Any) -> dict[str, Any]:
        def one(x: Tensor) -> dict[str, Any]:
            return check_first_state(start(th, x, **extra))

        if not p.numel():  # vmap needs at least one coordinate to learn the state's shape
            like = torch.vmap(one)(p.new_zeros(1))
            return trees.map(lambda x: x.narrow(0, 0, 0), like)
        return torch.vmap(one)(p)

    def update_coordinates(th: Tree, p: Tensor, g: Tensor, h: dict[str, Any], **extra: Any) -> Any:
        def one(x: Tensor, d: Tensor, s: dict[str, Any]) -> Any:
            delta, s = change(th, x, d, s, **extra)
            check_delta(delta, x)
            return delta, check_state(s, "step")

        return torch.vmap(one)(p, g, h)

    return lift_coordinates(
        fresh(init), start_coordinates, update_coordinates, chunk_size=chunk_size, needs=needs
    )


def lift_coordinates(
    init: Callable[..., Tree],
    start: Callable[[Tree, Tensor], dict[str, Any]],
    update: Callable[..., tuple[Tensor, dict[str, Any]]],
    *,
    chunk_size: int | None = None,
    needs: frozenset[str] = frozenset(),
) -> Optimizer:
    """An `Optimizer` from functions of a flat vector of independent coordinates.

    Args:
        init: ``init(generator=None) -> opt_params``.
        start: ``(opt_params, param: (N,)[, num_steps=]) -> dict`` of tensors ``(N, *state)``.
        update: ``(opt_params, param: (N,), grad: (N,), hidden[, loss=, extras=]) ->
            (delta: (N,), hidden)``.
        chunk_size: the most coordinates given to ``update`` at once.
        needs: as in `Optimizer`; where there are any, the functions get the keywords.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_num_steps(needs, num_steps)
        check_params(model_params)
        extra = {"num_steps": num_steps} if "num_steps" in needs else {}
        flat, spec = trees.flatten(model_params)
        states: list[dict[str, Any]] = []
        for p in flat:
            if p is None:
                states.append({})
                continue
            dtype = trees.compute_dtype(p)
            state = start(trees.cast(opt_params, dtype), p.to(dtype).reshape(-1), **extra)
            state = settled(state, dtype, p.device)
            states.append(
                trees.map(lambda x, p=p: _packed(x.reshape((*p.shape, *x.shape[1:]))), state)
            )
        return Hidden(trees.unflatten(spec, states), {})

    def advance(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Hidden,
        *,
        loss: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
        chunk_size: int | None = chunk_size,
        recompute: bool = False,
        own: bool = False,
    ) -> tuple[Tree, Hidden]:
        check_needs(needs, loss, extras)
        extra = {"loss": loss, "extras": extras} if needs else {}
        at = Leaves(model_params, grads, hidden, states_later=True)
        at.check_states(at.active, scalars=False)
        delta: list[Any] = [None] * len(at.params)
        states = list(at.states)
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in at.active:
            by_dtype.setdefault(trees.compute_dtype(at.params[i]), []).append(i)
        for dtype, group in by_dtype.items():
            pairs = [at.pair(i) for i in group]
            theta = at.weights(opt_params, dtype)
            given = [at.states[i] for i in group]
            change = partial(update, **extra)
            try:
                found = _in_tiles(change, theta, pairs, given, extra, chunk_size, own)
                if found is None:
                    found = _at_once(change, theta, pairs, given, chunk_size, recompute)
            except RULE_ERRORS as error:
                better = at.explained(error, init, opt_params)
                if better is error:
                    raise
                raise better from error
            for i, own_delta, own_state in zip(group, *found, strict=True):
                delta[i], states[i] = own_delta, own_state
        return at.tree(delta), Hidden(at.tree(states), hidden.shared)

    @leafwise
    def run(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **given: Any
    ) -> tuple[Tree, Hidden]:
        return advance(opt_params, model_params, grads, hidden, **given)

    def in_chunks(coordinates: int) -> Callable[..., Any]:
        size = coordinates if chunk_size is None else min(chunk_size, coordinates)
        in_pieces = partial(advance, chunk_size=size, recompute=True)
        return binned(in_pieces, coordinates, needs=needs, splits_leaves=True)

    chunkable(run, in_chunks)
    consuming(run, partial(advance, own=True))
    return Optimizer(init, init_hidden, run, needs)


def _in_tiles(
    update: Callable[..., Any],
    theta: Tree,
    pairs: Sequence[tuple[Tensor, Tensor]],
    states: Sequence[Any],
    extra: Mapping[str, Any],
    chunk_size: int | None,
    own: bool,
) -> tuple[list[Tensor], list[Any]] | None:
    """Delta and new state of each leaf; None where that is not the way."""
    params, grads = ([pair[i] for pair in pairs] for i in (0, 1))
    columns = [trees.leaves(state) for state in states]
    size = tile_of(params, grads, columns, (theta, dict(extra)))
    if size is None:
        return None
    size = size if chunk_size is None else min(size, chunk_size)
    return in_tiles(partial(update, theta), params, grads, states, size, own)


def _at_once(
    update: Callable[..., Any],
    theta: Tree,
    pairs: Sequence[tuple[Tensor, Tensor]],
    states: Sequence[Any],
    chunk_size: int | None,
    recompute: bool,
) -> tuple[list[Tensor], list[Any]]:
    """The same with all coordinates side by side."""
    columns, spec = [trees.leaves(state) for state in states], trees.flatten(states[0])[1]
    p, g = (_side_by_side([pair[i] for pair in pairs], 0) for i in (0, 1))
    h = [_side_by_side(list(c), c[0].ndim - pairs[0][0].ndim) for c in zip(*columns, strict=True)]
    change, new, new_spec = _chunked(update, theta, p, g, h, spec, chunk_size, recompute)
    shapes = [p.shape for p, _ in pairs]
    parts = [_apart(x, shapes) for x in new]
    rows = [trees.unflatten(new_spec, [x[j] for x in parts]) for j in range(len(pairs))]
    return _apart(change, shapes), rows


def _chunked(
    update: Callable[..., Any],
    theta: Tree,
    p: Tensor,
    g: Tensor,
    h: list[Tensor],
    spec: Any,
    size: int | None,
    recompute: bool,
) -> tuple[Tensor, list[Tensor], Any]:
    count = p.shape[0]
    if count == 0:
        return torch.zeros_like(p), h, spec
    size = count if size is None else size
    deltas, states, new_spec = [], [], spec
    # A bin that fits into one chunk is recomputed as a whole, by `binned`.
    if recompute and count > size and is_observed():
        update = remat(update)
    # One split and not many slices: its backward is one concatenation.
    for own in zip(*(x.split(size) for x in (p, g, *h)), strict=True):
        delta, state = update(theta, own[0], own[1], trees.unflatten(spec, own[2:]))
        leaves, new_spec = trees.flatten(state)
        deltas.append(delta)
        states.append(leaves)
    if len(deltas) == 1:
        return deltas[0], states[0], new_spec
    return torch.cat(deltas), [torch.cat(c) for c in zip(*states, strict=True)], new_spec


def _packed(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _side_by_side(tensors: list[Tensor], state_ndim: int) -> Tensor:
    flat = [x.reshape((-1, *x.shape[x.ndim - state_ndim :])) for x in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _apart(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    pieces = flat.split([s.numel() for s in shapes])
    return [x.reshape((*s, *flat.shape[1:])) for x, s in zip(pieces, shapes, strict=True)]


class _NetRule:
    """A module as the rule of one coordinate."""

    def __init__(
        self, module: nn.Module, features: Callable[[Tensor, Tensor], Tensor] | None, hidden: Any
    ) -> None:
        self.apply, self.params, self.buffers = functionalize(module)
        self.features = features or (lambda param, grad: torch.stack([grad, param]))
        self.cell = isinstance(module, nn.RNNCellBase)
        if self.cell:
            size = module.hidden_size
            hidden = (size, size) if isinstance(module, nn.LSTMCell) else size
        self.sizes = hidden
        for x in trees.leaves(hidden):
            if x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < 1):
                raise ValueError(f"hidden must be None or positive sizes, got {hidden!r}")

    def init(self, generator: Any) -> Tree:
        # The module's own values are the start: nothing is drawn, so no generator is used.
        return dict(self.params)

    def init_hidden(self, th: Tree, p: Tensor) -> dict[str, Any]:
        if self.sizes is None:
            return {}
        return {"state": trees.map(lambda n: p.new_zeros(n), self.sizes)}

    def update(self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Any]) -> Any:
        buffers = trees.cast(moved(self.buffers, p.device), p.dtype)
        x = self.features(p, g)
        if self.sizes is None:
            return self.apply(th, buffers, x).select(-1, 0), h
        result = self.apply(th, buffers, x, h["state"])
        if not self.cell:
            if not isinstance(result, tuple) or len(result) != 2:
                raise ValueError(
                    "with hidden, the module must return (out, state) as it is called with "
                    f"(features, state), got a {type(result).__name__}"
                )
            out, state = result
        elif isinstance(result, tuple):
            out, state = result[0], result
        else:
            out, state = result, result
        return out.select(-1, 0), {"state": state}
