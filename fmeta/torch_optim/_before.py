"""What a step does before the update: collects, checks and lays out what goes in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.optimizer import Hidden
from fmeta.torch_optim import _checks, _sharded, _states
from fmeta.torch_optim._advance import GroupOptions, Inputs, all_finite
from fmeta.torch_optim._first_state import asks_for_state
from fmeta.torch_optim._options import as_python
from fmeta.torch_optim._slots import SKIPPED

__all__ = ["Call", "prepare"]


class Call(NamedTuple):
    """One step, laid out.

    Attributes:
        inputs: what the update depends on.
        states: the dict of each parameter (None at those that stay as they are).
        active: positions of the parameters that are updated.
        layout: these, with dtype and strides of their gradients.
        device: where they are.
    """

    inputs: Inputs
    states: list[Any]
    active: list[int]
    layout: list[Any]
    device: torch.device


def prepare(opt: Any, loss: Any, extras: Any, traced: bool) -> Call | None:
    """Everything for a step of ``opt``; None when it has no effect.

    Args:
        opt: the `LearnedOptimizer`.
        loss, extras: as given to ``step``.
        traced: whether Python numbers would be compiled in.
    """
    flat: list[Tensor] = []
    grads: list[Tensor | None] = []
    runs: list[tuple[dict[str, Any], list[int]]] = []
    at = 0
    for group in opt.param_groups:
        here: list[int] = []
        for p in group["params"]:
            g = p.grad
            if g is not None:
                here.append(at)
            flat.append(p)
            grads.append(g)
            at += 1
        if here:
            runs.append((group, here))
    active = runs[0][1] if len(runs) == 1 else [i for _, here in runs for i in here]
    if not active:
        return None
    if at != len(opt._slots):
        opt._find_slots()  # somebody has changed the groups
    device = _checks.check_tensors(opt, flat, grads, active)
    sharded = _sharded.is_sharded(flat)
    if sharded and traced:
        raise _checks.compiled_and_sharded()
    loss = _checks.as_loss(loss, device)
    needs = opt._rule.optimizer.needs
    if sharded and "loss" in needs:
        loss = _sharded.mean_loss(loss, flat)
    only_start = (
        device.type != "meta"
        and opt._stateful
        and asks_for_state(opt.state, opt.param_groups, [grads[i] for i in active])
    )
    if not only_start:
        _checks.check_given(needs, loss, extras)
    climbing = {bool(group["maximize"]) for group, _ in runs}
    if "loss" in needs and True in climbing:
        if False in climbing:
            raise ValueError(
                "this rule reads the loss, which some groups maximize and others minimize: use two "
                "optimizers"
            )
        loss = None if loss is None else -loss
    weights = opt._weights_on(device)
    states = _states.fetch(opt, flat, active, weights)
    if only_start:
        return None
    _checks.check_unscaled(opt._rule.optimizer, [group for group, _ in runs])
    skips = opt._nonfinite == "skip"
    # On a CPU a look at a value is free; shards are updated after an exchange of values anyway.
    masked = skips and (traced or device.type != "cpu") and not sharded
    if opt._nonfinite != "allow" and not masked and device.type != "meta":
        read = loss if "loss" in needs else None
        if not bool(all_finite([grads[i] for i in active], read, flat if sharded else ())):
            if not skips:
                raise _checks.not_finite([(opt._label(i), grads[i]) for i in active], read)
            _states.spread(opt, {SKIPPED: _states.skipped_steps(opt) + 1})
            return None
    if masked and not any(SKIPPED in state for state in states if state):
        # A state that was saved without a count gets one.
        _states.spread(opt, {SKIPPED: torch.zeros((), dtype=torch.int64, device=device)})
    in_place = traced or any(group["capturable"] for group in opt.param_groups)
    if in_place:
        _states.own_memory(opt)
    keys = opt._keys()
    params: list[Any] = flat
    leaves: list[Any] = [{}] * at
    slots = opt._slots
    if len(active) < at:
        # The others are shown where that costs nothing.
        params = [
            p if p.is_floating_point() and p.device == device and not sharded else None
            for p in flat
        ]
        for i in active:
            params[i] = flat[i]
        # With their state, as in the functional form; without one a leaf is no parameter.
        shown = {i for i, p in enumerate(params) if p is not None} - {*active}
        for i in shown:
            own = opt.state.get(flat[i], {})
            if slots[i].held_by(own):
                leaves[i] = slots[i].read(own)
            else:
                params[i] = None
    for i in active:
        leaves[i] = slots[i].read(states[i])
    shared = opt._shared_slots.read(_states.holder_of(opt, opt._shared_slots) or {})
    groups = [
        GroupOptions([keys[i] for i in here], *numbers(group, traced), group["maximize"])
        for group, here in runs
    ]
    # How gradients lie in memory may decide whether a rule returns one of them as its state.
    seen: list[Any] = [grads[i] for i in active]
    layout = [active, [g.dtype for g in seen], [g.stride() for g in seen]]
    careful = traced or layout != opt._clean_for
    if careful:
        _checks.check_dtypes(opt, flat, states, active)
    inputs = Inputs(
        weights,
        opt._tree(params),
        opt._tree(grads),
        Hidden(opt._tree(leaves), shared),
        groups,
        loss,
        extras,
        _states.skipped_steps(opt) if masked else None,
        sharded,
        in_place,
        # Without a state there is nothing to gain; then a step changes all of its parameters, or
        # (where it fails) none.
        opt._stateful
        and not (traced or in_place or masked or sharded)
        and opt._fresh.issuperset(active),
        careful,
    )
    return Call(inputs, states, active, layout, device)


def numbers(group: dict[str, Any], as_tensors: bool) -> tuple[Any, Any]:
    """Learning rate and decay of a group, as tensors where numbers would be compiled in."""
    lr, decay = as_python(group["lr"]), as_python(group["weight_decay"])
    for key, x in (("lr", lr), ("weight_decay", decay)):
        if isinstance(x, bool) or not isinstance(x, (int, float, Tensor)):
            raise TypeError(f"group[{key!r}] must be a number or a scalar tensor, got {x!r}")
    if isinstance(lr, Tensor):
        lr = lr.detach().reshape(())
    elif as_tensors:
        lr = torch.tensor(float(lr), dtype=torch.float64)
    if isinstance(decay, Tensor):
        decay = decay.detach().reshape(())
    elif as_tensors and decay != 0:
        decay = torch.tensor(float(decay), dtype=torch.float64)
    return lr, decay
