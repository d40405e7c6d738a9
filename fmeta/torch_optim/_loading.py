"""Loading a state exactly: no cast, and only into the rule that it is of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fmeta.optimizers import BUILDERS
from fmeta.torch_optim._slots import SKIPPED, slots_of

__all__ = ["loaded_exactly"]


@contextmanager
def loaded_exactly(opt: Any) -> Iterator[None]:
    """Within it, `torch.optim.Optimizer.load_state_dict` leaves the state to us.

    torch casts what it loads to the parameter's dtype; the hidden state of a bfloat16 parameter is
    float32 and its counts are integers. So the state is taken out of the dict before torch sees
    it, after all hooks of users, and put back before their later hooks. An error leaves the
    optimizer as it was.
    """
    placed: dict[Any, Any] = {}
    own_names = [group.get("param_names") for group in opt.param_groups]

    def take(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = state_dict["param_groups"]
        _check_weights(opt, groups)
        _warn_of_horizon(opt._horizon(), groups)
        ids = [i for group in groups for i in group["params"]]
        params = opt._params()
        if len(ids) == len(params):  # else torch says what is wrong
            params = _by_name(params, groups, opt.param_groups)
            placed.update(_placed(opt, dict(zip(ids, params, strict=True)), state_dict))
        return {**state_dict, "state": {}}

    def put(_: Any) -> None:
        for group, names in zip(opt.param_groups, own_names, strict=True):
            group["rule"] = opt._rule.name
            # Those of this model, by which a rule may tell parameters apart.
            group.pop("param_names", None)
            if names is not None:
                group["param_names"] = names
        opt._find_slots()
        opt._owned, opt._begun = False, None
        opt.state.update(placed)

    hooks = (
        opt.register_load_state_dict_pre_hook(take),
        opt.register_load_state_dict_post_hook(put, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _by_name(
    params: list[Tensor], saved: list[dict[str, Any]], own: list[dict[str, Any]]
) -> list[Tensor]:
    """The parameters in the order of the saved ones: by name where both have the same names."""
    theirs, ours = (
        [n for g in groups for n in g.get("param_names") or ()] for groups in (saved, own)
    )
    if len(ours) != len(params) or sorted(theirs) != sorted(ours):
        return params  # in order, as torch does
    named = dict(zip(ours, params, strict=True))
    return [named[name] for name in theirs]


def _check_weights(opt: Any, groups: list[dict[str, Any]]) -> None:
    """Raises a ValueError when the state belongs to another rule or to other weights."""
    for group in groups:
        got, name = group.get("weights_hash"), group.get("rule")
        if name != opt._rule.name and {name, opt._rule.name} <= {*BUILDERS}:
            raise ValueError(
                f"this state is of the rule {name}, but the optimizer is {opt._rule.name}: load it "
                f"into LearnedOptimizer(..., {name!r})"
            )
        if got == opt._rule.digest:
            continue
        if got is None:
            raise ValueError(
                f"this state is of no fmeta rule, but the optimizer is {opt._rule.name}: the state "
                "of another optimizer, as one of torch.optim, holds other averages and cannot be "
                "taken over; load the model alone and begin with a fresh state"
            )
        raise ValueError(
            f"this state is of {name} with weights {got[:12]}, but the optimizer is "
            f"{opt._rule.name} with weights {opt._rule.digest[:12]}: build LearnedOptimizer with "
            "the weights that the state was made with; to go on with these all the same, set "
            "state_dict['param_groups'][i]['weights_hash'] = opt.param_groups[i]['weights_hash'] "
            "first"
        )


def _warn_of_horizon(own: Any, groups: list[dict[str, Any]]) -> None:
    saved = groups[0].get("num_steps") if groups else None
    if None not in (own, saved) and own != saved:
        warnings.warn(
            f"this state is of a training of num_steps={saved}, which is taken, and not the "
            f"num_steps={own} that the optimizer was built with: give it the same",
            UserWarning,
            stacklevel=2,
        )


def _placed(opt: Any, params: dict[Any, Tensor], state_dict: dict[str, Any]) -> dict[Any, Any]:
    """The saved state by parameter, in the dtypes of the rule and on the parameter's device."""
    rule = opt._rule
    horizon = state_dict["param_groups"][0].get("num_steps", opt._horizon())
    slots, shared = slots_of(rule.optimizer, rule.opt_params, opt._param_tree(), horizon)
    positions = {id(p): i for i, p in enumerate(opt._params())}
    found: dict[Any, Any] = {}
    for key, state in state_dict["state"].items():
        if key not in params:
            found[key] = state  # of no parameter: kept as it is, as torch does
            continue
        if not state:
            continue
        p = params[key]
        i = positions[id(p)]
        kinds = {
            k: kind for s in (slots[i], shared) for k, kind in zip(s.keys, s.kinds, strict=True)
        }
        if {*state} - {SKIPPED} != {*kinds}:
            raise ValueError(
                f"the state of {opt._label(i)} holds {', '.join(sorted(state))}, but that of the "
                f"rule {rule.name} is {', '.join(kinds) or 'empty'}: it was saved by another rule"
            )
        plain = type(p) in (Tensor, torch.nn.Parameter)
        for k, kind in kinds.items() if plain else ():
            if isinstance(state[k], Tensor) and kind and tuple(state[k].shape) != kind[0]:
                raise ValueError(
                    f"the state {k!r} of {opt._label(i)} has shape {tuple(state[k].shape)}, "
                    f"expected {kind[0]}: it was saved for another model, or its parameters came "
                    "in another order"
                )
        found[p] = {k: _settled(x, kinds.get(k), p) for k, x in state.items()}
    return found


def _settled(x: Any, kind: Any, param: Tensor) -> Any:
    if kind is not None and isinstance(x, (int, float)):
        return torch.tensor(x, dtype=kind[1], device=param.device)
    if not isinstance(x, Tensor):
        return x
    dtype = kind[1] if kind is not None and x.is_floating_point() else x.dtype
    return x.to(param.device, dtype)
