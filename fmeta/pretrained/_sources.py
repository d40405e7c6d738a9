"""Where weights are: files, folders, names on the hub; and what arrays they hold."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmeta import _files
from fmeta.pretrained import _hub

__all__ = ["PICKLED", "Source", "arrays_in", "weight_files"]

Source = str | os.PathLike[str]

PICKLED = (".pt", ".pth", ".bin")
# What huggingface_hub writes beside the weights, and what fmeta's rules take for granted of it.
_CONFIG = "config.json"
_ASSUMED = {"activation": "relu", "mix_layers": True}


def weight_files(source: Source | Sequence[Source]) -> list[Path]:
    """The files with weights at a path or under a name.

    Args:
        source: a file, a folder, a name on the hub, or several of these. Of a folder's files
            ``*.safetensors`` are preferred to those of `torch.save`; without any, those of the
            folders in it are taken.

    Raises:
        FileNotFoundError: no such file or folder, or none with weights in it.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Sequence) or not source:
            raise TypeError(
                "give a path, a name on the hub, or one or more of these in a tuple, got "
                f"{source!r}"
            )
        return [file for one in source for file in weight_files(one)]
    if _hub.is_name(source):
        folder = _hub.fetched(str(source))
    else:
        folder = Path(source)
        if folder.is_file():
            return [folder]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no file {source}, nor is this a name on the hub (owner/name)"
            )
    own = _in_folder(folder)
    if not own:
        own = [f for x in sorted(folder.iterdir()) if x.is_dir() for f in _in_folder(x)]
    if not own:
        raise FileNotFoundError(
            f"the folder {folder} holds no weights: there is no *.safetensors, "
            f"{', '.join('*' + x for x in PICKLED)} in it"
        )
    return own


def arrays_in(files: Sequence[Path]) -> dict[str, Tensor]:
    """The arrays of all these files by name.

    Raises:
        ValueError: a file that cannot be read, two with an array of one name, or a configuration
            beside them that asks for another network (with the file).
    """
    found: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for file in files:
        _check_config(file.parent / _CONFIG)
        for name, x in _read(file).items():
            if name in found:
                raise ValueError(
                    f"{origin[name]} and {file} both hold an array {name}: give one of them"
                )
            found[name], origin[name] = x, file
    return found


def _in_folder(folder: Path) -> list[Path]:
    files = sorted(x for x in folder.iterdir() if x.is_file())
    found = [x for x in files if x.suffix == ".safetensors"]
    return found or [x for x in files if x.suffix in PICKLED]


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.suffix not in PICKLED:
        return _files.read_tensors(file)
    try:
        value: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, by what is wrong with the file
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{file} is no file of tensors ({reason}): nothing else is read, for a pickle can run "
            "code; save a state dict, torch.save(network.state_dict(), path)"
        ) from None
    if not isinstance(value, Mapping) or not all(isinstance(x, Tensor) for x in value.values()):
        inside = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{file} holds no state dict (names and tensors) but {inside}: save the network's own, "
            "torch.save(network.state_dict(), path)"
        )
    return value


def _check_config(path: Path) -> None:
    if not path.is_file():
        return
    config = _files.read_json(path)
    for name, assumed in _ASSUMED.items():
        if isinstance(config, dict) and config.get(name, assumed) != assumed:
            raise ValueError(
                f"{path} is of a network with {name} {config[name]!r}, but fmeta's rule has "
                f"{assumed!r}"
            )
