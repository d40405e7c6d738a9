"""A learner that `fmeta fewshot` has trained, to be used."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from fmeta import _files
from fmeta.fewshot._config import FewShotConfig
from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._source import Source
from fmeta.meta_train import read_config

__all__ = ["Trained", "load_run"]


class Trained(NamedTuple):
    """What a run has learned.

    Attributes:
        learner: as it was meta-trained.
        meta_params: the best by validation, or the last.
        source: of the run's episodes.
    """

    learner: MetaLearner
    meta_params: Any
    source: Source


def load_run(
    folder: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
) -> Trained:
    """Reads the folder of a run of `few_shot`: ``config.json`` and ``weights.safetensors``.

    Args:
        folder: ``OUT/NAME`` of the run.
        root: where the data are now, if they have moved.

    Returns:
        A `Trained`.

    Raises:
        FileNotFoundError: no such run, one that has not come to its weights, or data that are not
            there.
        ValueError: a damaged file, or weights of another network.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json", FewShotConfig())
    if root is not None:
        config = dataclasses.replace(config, root=str(root))
    weights = folder / "weights.safetensors"
    if not weights.exists():
        raise FileNotFoundError(
            f"there is no {weights}: the run has not come to its end, go on with it by fmeta "
            f"fewshot --resume --out {folder.parent} --name {folder.name}"
        )
    source = config.source()
    learner = config.build(source)
    meta_params = _files.load_tree(weights, learner.init())
    return Trained(learner, meta_params, source)
