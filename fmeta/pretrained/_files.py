"""Weight files: fmeta's own are written and read, those of PyLO are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fmeta import _files, optimizers, trees
from fmeta.optimizer import Optimizer
from fmeta.pretrained._pylo import Found, recognised
from fmeta.pretrained._sources import PICKLED, Source, arrays_in, weight_files

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
    if os.fspath(path).endswith(PICKLED):
        raise ValueError(
            f"{os.fspath(path)}: that ending is of files by torch.save, and these are safetensors: "
            "name it *.safetensors"
        )
    _check_like(rule_name, builder_arguments, opt_params)
    for name, x in zip(trees.paths(opt_params), trees.leaves(opt_params), strict=True):
        if not x.is_floating_point():
            raise ValueError(f"opt_params at path {name} are {x.dtype}: weights are floating")
    try:
        header = {"arguments": builder_arguments, "format": _FORMAT, "rule": rule_name}
        written = json.dumps(header, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"builder arguments must be plain values: {error}") from None
    header["checksum"] = _files.checksum(_files.by_path(opt_params), written)
    # One entry: safetensors writes several in any order, and equal weights give equal files.
    _files.save_tree(path, opt_params, {_KEY: json.dumps(header, sort_keys=True)})


def load(path: Source | Sequence[Source], **builder_arguments: Any) -> tuple[Optimizer, Any]:
    """Reads weights that `save` wrote, or those of PyLO's networks.

    PyLO's ``MetaMLP`` (the weights of AdafacLO and MuLO) becomes `fmeta.optimizers.adafactor_mlp`
    with the step size and the decays that PyLO uses with it, which are not in the file; MuLO's
    smaller rates for wide layers (muP) are the caller's: groups with their own ``lr``. ``CELO2MLP``
    becomes `fmeta.optimizers.normalized_mlp` with its default arguments (``orthogonalize=True`` and
    a schedule are PyLO's). ``VeLOMLP`` and ``VeLORNN``, both of them, become
    `fmeta.optimizers.velo`, with ``lr=1``. Names and shapes of the arrays tell which network it is.

    Args:
        path: a ``.safetensors`` file; a ``.pt``, ``.pth`` or ``.bin`` file with a state dict, of
            which tensors only are read (``weights_only=True``: no code in it is run); a folder with
            such files; or a name on the Hugging Face hub, ``"owner/name"``, which takes the extra
            ``hub`` and a network. For VeLO two of these, ``load((rnn, mlp))``, or a folder or file
            that holds both.
        **builder_arguments: override those in the file, or PyLO's (another ``lr``, say).

    Returns:
        ``(optimizer, opt_params)``.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        ModuleNotFoundError: a name on the hub without the extra ``hub``.
        OSError: a name on the hub that is neither in the cache nor to be had.
        ValueError: no file of tensors, one of another program, or arrays that do not fit the rule
            (with their names), a file that is damaged.

    Example:
        >>> import tempfile, fmeta.optimizers
        >>> path = tempfile.mkdtemp() + "/weights.safetensors"
        >>> save(path, "linear", fmeta.optimizers.linear(lr=0.5).init(), lr=0.5)
        >>> load(path)[1]
        {'weight': tensor([[-0.5000,  0.0000]])}
    """
    files = weight_files(path)
    own = [file for file in files if _is_own(file)]
    if own and len(files) > 1:
        raise ValueError(
            f"{path} holds several files with weights, {', '.join(map(str, files))}: give one"
        )
    if own:
        arrays = _files.read_tensors(own[0])
        rule_name, arguments = _header(own[0], arrays)
        optimizer = _build(rule_name, {**arguments, **builder_arguments})
        return optimizer, _files.tree_of(own[0], arrays, optimizer.init(), any_float=True)
    named = ", ".join(map(str, files))
    arrays = arrays_in(files)
    try:
        found = recognised(arrays)
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from None
    if found is None:
        raise ValueError(
            f"{named} was not written by fmeta.pretrained.save, for its header names no rule, and "
            f"is none of PyLO's networks: its arrays are {', '.join(arrays) or 'none'}"
        )
    optimizer = _build(found.rule_name, {**found.arguments, **builder_arguments})
    _check_sizes(named, found, optimizer)
    return optimizer, found.opt_params


def _check_sizes(named: str, found: Found, optimizer: Optimizer) -> None:
    """Raises when the builder's arguments ask for weights of other sizes than the file's."""
    like, got = _files.by_path(optimizer.init()), _files.by_path(found.opt_params)
    for name in like.keys() | got.keys():
        sizes = [tuple(x[name].shape) if name in x else "none" for x in (got, like)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{named}: the weights give {found.rule_name} an array {name} of shape {sizes[0]}, "
                f"but with these arguments it takes one of {sizes[1]}: leave out the sizes, they "
                "are known from the file"
            )


def _is_own(path: Path) -> bool:
    return path.suffix not in PICKLED and _KEY in _files.read_metadata(path)


def _header(
    path: str | os.PathLike[str], arrays: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any]]:
    """The rule's name and arguments, from a file's header, which may have a sum of its arrays."""
    metadata = _files.read_metadata(path)
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
    saved = header.pop("checksum", None)
    if saved not in (None, _files.checksum(arrays, json.dumps(header, sort_keys=True))):
        raise ValueError(f"{path} is damaged: its bytes are not those that were written")
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
