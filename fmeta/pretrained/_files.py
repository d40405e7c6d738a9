"""fmeta's own weight files."""

from __future__ import annotations

import json
import os
from typing import Any

from fmeta import _files, optimizers, trees
from fmeta.optimizer import Optimizer

__all__ = ["load", "save"]

_KEY, _FORMAT = "fmeta", 1


def save(
    path: str | os.PathLike[str], rule_name: str, opt_params: Any, **builder_arguments: Any
) -> None:
    """Writes the weights of a rule, with its name and arguments, atomically.

    Args:
        path: a ``.safetensors`` file.
        rule_name: name of a builder in `fmeta.optimizers`.
        opt_params: what the rule learned, structured as its ``init`` gives it.
        **builder_arguments: the builder's arguments (numbers, strings, lists of these).

    Raises:
        ValueError: unknown rule, weights that do not fit it (with the path), or arguments that
            JSON cannot hold.
    """
    _check_like(rule_name, builder_arguments, opt_params)
    try:
        header = json.dumps(
            {"format": _FORMAT, "rule": rule_name, "arguments": builder_arguments}, sort_keys=True
        )
    except TypeError as error:
        raise ValueError(f"builder arguments must be plain values: {error}") from None
    # One entry: safetensors writes several in any order, and equal weights give equal files.
    _files.save_tree(path, opt_params, {_KEY: header})


def load(path: str | os.PathLike[str], **builder_arguments: Any) -> tuple[Optimizer, Any]:
    """Reads weights that `save` wrote.

    Args:
        path: a ``.safetensors`` file.
        **builder_arguments: override those in the file (another ``lr``, say).

    Returns:
        ``(optimizer, opt_params)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, one of another program, or arrays that do not fit
            the rule (with their names).

    Example:
        >>> import tempfile, fmeta.optimizers
        >>> path = tempfile.mkdtemp() + "/weights.safetensors"
        >>> save(path, "linear", fmeta.optimizers.linear(lr=0.5).init(), lr=0.5)
        >>> load(path)[1]
        {'weight': tensor([[-0.5000,  0.0000]])}
    """
    rule_name, arguments = _header(path)
    optimizer = _build(rule_name, {**arguments, **builder_arguments})
    return optimizer, _files.load_tree(path, optimizer.init(), any_float=True)


def _header(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """The rule's name and arguments, from a file's header."""
    metadata = _files.read_metadata(path)
    if _KEY not in metadata:
        raise ValueError(
            f"{path} was not written by fmeta.pretrained.save: its header names no rule"
        )
    try:
        header = json.loads(metadata[_KEY])
        version = header["format"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} has a header that is damaged: {metadata[_KEY]!r}") from None
    if version != _FORMAT:
        raise ValueError(f"{path} has format {version!r}, but this version reads {_FORMAT}")
    rule_name, arguments = header.get("rule"), header.get("arguments")
    if not isinstance(rule_name, str) or not isinstance(arguments, dict):
        raise ValueError(f"{path} has a header that is damaged: {metadata[_KEY]!r}")
    return rule_name, arguments


def _build(rule_name: str, arguments: dict[str, Any]) -> Optimizer:
    builder = optimizers.get(rule_name)
    try:
        return builder(**arguments)
    except TypeError as error:
        raise ValueError(f"rule {rule_name!r} cannot be built with {arguments}: {error}") from None


def _check_like(rule_name: str, arguments: dict[str, Any], opt_params: Any) -> None:
    trees.match(
        _build(rule_name, arguments).init(),
        opt_params,
        f"opt_params of {rule_name}",
        allow_none=False,
    )
