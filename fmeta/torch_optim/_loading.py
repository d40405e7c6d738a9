"""Loading a state exactly: no cast, and only into the rule that it is of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fmeta.torch_optim._slots import SKIPPED

__all__ = ["loaded_exactly"]


@contextmanager
def loaded_exactly(opt: Any) -> Iterator[None]:
    """Within it, `torch.optim.Optimizer.load_state_dict` leaves the state to us.

    torch casts what it loads to the parameter's dtype; the hidden state of a bfloat16 parameter is
    float32 and its counts are integers. So the state is taken out of the dict before torch sees
    it, after all hooks of users, and put back before their later hooks.
    """
    taken: dict[str, Any] = {}

    def take(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        check_weights(opt, state_dict["param_groups"])
        taken.update(state_dict)
        return {**state_dict, "state": {}}

    def put(_: Any) -> None:
        ids = [i for g in taken["param_groups"] for i in g["params"]]
        place(opt, dict(zip(ids, opt._params(), strict=True)), taken["state"])

    hooks = (
        opt.register_load_state_dict_pre_hook(take),
        opt.register_load_state_dict_post_hook(put, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_weights(opt: Any, groups: list[dict[str, Any]]) -> None:
    """Raises a ValueError when the state belongs to other weights."""
    for group in groups:
        got = group.get("weights_hash")
        if got == opt._rule.digest:
            continue
        of = "no fmeta rule" if got is None else f"{group.get('rule')} with weights {got[:12]}"
        raise ValueError(
            f"this state is of {of}, but the optimizer is {opt._rule.name} with weights "
            f"{opt._rule.digest[:12]}: build LearnedOptimizer with the weights that the state was "
            "made with; to go on with these all the same, set state_dict['param_groups'][i]"
            "['weights_hash'] = opt.param_groups[i]['weights_hash'] first"
        )


def place(opt: Any, params: dict[Any, Tensor], saved: dict[Any, Any]) -> None:
    """Puts the saved state into the optimizer, in the dtypes of its rule."""
    opt._find_slots()
    positions = {id(p): i for i, p in enumerate(opt._params())}
    opt._owned = False
    for key, state in saved.items():
        if key not in params:
            opt.state[key] = state
            continue
        p = params[key]
        i = positions[id(p)]
        if not state:
            continue
        slots = [opt._slots[i], opt._shared_slots]
        kinds = {k: kind for s in slots for k, kind in zip(s.keys, s.kinds, strict=True)}
        missing = [k for k in kinds if k not in state]
        extra = [k for k in state if k not in kinds and k != SKIPPED]
        if missing or extra:
            raise ValueError(
                f"the state of {opt._label(i)} holds {', '.join(state)}, but that of the rule "
                f"{opt._rule.name} is {', '.join(kinds) or 'empty'}: it was saved by another rule"
            )
        opt.state[p] = {k: _settled(x, kinds.get(k), p) for k, x in state.items()}


def _settled(x: Any, kind: Any, param: Tensor) -> Any:
    if not isinstance(x, Tensor):
        return x
    dtype = kind[1] if kind is not None and x.is_floating_point() else x.dtype
    return x.to(param.device, dtype)
