"""Meta-parameters that are not a learner's, told by the name of what is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fmeta.fewshot._contract import MetaLearner

__all__ = ["with_parts"]

Tree = Any


def with_parts(learner: MetaLearner, *, adapt: Sequence[str] | None = None) -> MetaLearner:
    """The learner, which tells meta-parameters that lack a part of what its ``init`` gives.

    More than that may be there: an ``estimate`` of one's own may learn it.

    Args:
        learner: whose meta-parameters are a dict.
        adapt: which parts ``adapt`` reads; None: all.
    """
    names = _names(learner.init())
    read = names if adapt is None else {k: names[k] for k in adapt}
    return learner._replace(
        estimate=_checking(learner.estimate, names), adapt=_checking(learner.adapt, read)
    )


def _checking(fn: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def call(meta_params: Tree, *args: Any, **options: Any) -> Any:
        _check(meta_params, names, "meta_params")
        return fn(meta_params, *args, **options)

    return call


def _names(tree: Tree) -> Any:
    """Its dicts without their tensors."""
    return {k: _names(v) for k, v in tree.items()} if isinstance(tree, Mapping) else None


def _check(given: Tree, names: Any, path: str) -> None:
    if names is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{path} must be a dict, as init() of this learner returns it, got a "
            f"{type(given).__name__}"
        )
    for name, below in names.items():
        if name not in given:
            raise ValueError(
                f"{path} has no {name!r}, only {', '.join(map(repr, given)) or 'nothing'}: give "
                "what init() of this learner returns, or what was learned from there"
            )
        _check(given[name], below, f"{path}[{name!r}]")
