"""Whether a step that did not end (an error, Ctrl-C) has left something half written.

A step whose rule may use the memory of the old hidden state counts as one that has. Any other
writes nothing before the update is known, and what is written then has a version that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fmeta import trees
from fmeta._leafwise import consuming_update
from fmeta.torch_optim import _sharded
from fmeta.torch_optim._before import Call

__all__ = ["TORN", "Begun", "begun", "is_torn"]


class Begun(NamedTuple):
    """A step that has not ended.

    Attributes:
        tensors: what it writes to in the end; None: it may write at any time.
        version: the sum of their versions when it began.
    """

    tensors: Sequence[Tensor] | None
    version: int


TORN = Begun(None, 0)


def begun(opt: Any, call: Call | None) -> Begun | None:
    """The step that begins with ``call``; None where nothing can be left half written."""
    if call is None or not opt._stateful:
        return None
    rule, x = opt._rule.optimizer, call.inputs
    if x.consumes and consuming_update(rule) is not rule.update:
        return TORN
    keys = [k for group in x.groups for k in group.keys]
    written = [x.params[k] for k in keys]
    if x.in_place:
        states = trees.leaves([[x.hidden.leaves[k] for k in keys], x.hidden.shared])
        written += [s for s in states if isinstance(s, Tensor)]
    return Begun(written, _version(written))


def is_torn(step: Begun | None) -> bool:
    """Whether it has written something by now."""
    if step is None:
        return False
    return step.tensors is None or _version(step.tensors) != step.version


def _version(tensors: Sequence[Tensor]) -> int:
    return sum(0 if x.is_inference() else x._version for x in map(_sharded.local, tensors))
