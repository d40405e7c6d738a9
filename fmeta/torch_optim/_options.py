"""Options of parameter groups as they are given: kinds of numbers, names that mean nothing."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["as_python", "warn_of_unknown"]

_OF_THE_WHOLE = ("name_or_optimizer", "opt_params", "nonfinite", "compile")
_OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay", "decay": "weight_decay"}


def as_python(x: Any) -> Any:
    """A real number of NumPy as Python's, which `torch.load` takes from a state_dict."""
    return x.item() if isinstance(x, (np.floating, np.integer)) else x


def warn_of_unknown(
    group: Mapping[str, Any], known: Iterable[str], given: Mapping[str, Any]
) -> None:
    """Warns of options that look as if they had an effect.

    Schedulers and libraries keep numbers and names of their own in a group; only what the
    constructor takes for the whole optimizer, and what nearly is an option, is meant for us.

    Args:
        group: a group.
        known: the options that have a meaning.
        given: what the constructor was given for the whole: as that, an option of a group is no
            mistake (`torch.distributed.optim.ZeroRedundancyOptimizer` repeats it there).
    """
    known = list(known)
    for key, value in group.items():
        if not isinstance(key, str) or key in known:
            continue
        if key in given and (given[key] is value or (_plain(value) and given[key] == value)):
            continue
        if key in _OF_THE_WHOLE:
            cure = f"it is one for all groups: LearnedOptimizer(..., {key}=...)"
        else:
            plain = key.lower()
            near = difflib.get_close_matches(plain, known, 1, 0.85)
            meant = _OTHER_NAMES.get(plain) or (near[0] if near else None)
            if meant is None:
                continue
            cure = f"did you mean {meant!r}?"
        warnings.warn(
            f"the option {key!r} of a parameter group has no effect; {cure}",
            UserWarning,
            stacklevel=2,
        )


def _plain(x: Any) -> bool:
    return isinstance(x, (str, bool, type(None)))
