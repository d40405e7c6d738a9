"""Tells a step of training from the one by which torch makes an optimizer create its state.

`torch.distributed.checkpoint.state_dict` takes a step without loss, with zeros as gradients and as
learning rates, when it reads or writes the state of an optimizer that has none yet. Taken as a step
it would advance counts, moments and schedules of the rule: who saved before the first step would
train on differently from who did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmeta.torch_optim import _sharded

__all__ = ["asks_for_state"]


def asks_for_state(
    state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], grads: Sequence[Any]
) -> bool:
    """Whether a step with these gradients is to create the state and change nothing.

    So it is where there is no state, and every learning rate and every gradient is zero. Values
    are looked at only in a first step at learning rate 0 (a warm-up may begin with one). All
    processes that share the parameters find the same.
    """
    if state or not all(float(group["lr"]) == 0 for group in groups):
        return False
    return not any(bool(_sharded.full(g).any()) for g in grads)
