"""Weights by name from the Hugging Face hub (the extra ``hub``, and a network)."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

__all__ = ["fetched", "is_name"]

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Nothing else of a repository is read; weights of other frameworks stay where they are.
_PATTERNS = ["*.safetensors", "*.json", "*.bin", "*.pt", "*.pth"]
_FILES = tuple(p[1:] for p in _PATTERNS)


def is_name(source: Any) -> bool:
    """Whether this is ``"owner/name"`` and no existing path, nor the path of a weight file."""
    return (
        isinstance(source, str)
        and _NAME.fullmatch(source) is not None
        and not source.startswith(".")
        and not source.endswith(_FILES)
        and not os.path.exists(source)
    )


def fetched(name: str) -> Path:
    """The folder with a repository's files, which the hub's client keeps in its cache.

    Raises:
        ModuleNotFoundError: without huggingface_hub.
        OSError: when the files are neither in the cache nor to be had.
    """
    elsewhere = f"or download the files of {name} elsewhere and give the path of their folder"
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise ModuleNotFoundError(
            f"there is no path {name}, and to fetch weights by name takes huggingface_hub: "
            f"pip install 'fmeta[hub]', {elsewhere}",
            name="huggingface_hub",
        ) from None
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as error:  # the client raises those of whatever library it talks through
        raise OSError(
            f"there is no path {name}, and the Hugging Face hub did not give the weights of that "
            f"name ({type(error).__name__}: {error}): check the name and the network, {elsewhere}"
        ) from error
