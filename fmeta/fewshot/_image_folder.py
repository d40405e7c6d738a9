"""Few-shot classes from folders of images: your own, and Omniglot's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._source import Source, from_classes

__all__ = ["image_folder", "omniglot"]

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SPLIT_NAMES = ("train", "validation", "test")


def image_folder(
    root: str | os.PathLike[str],
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    *,
    side: int = 28,
    color: bool = False,
) -> Source:
    """Episodes from ``root/SPLIT/CLASS/IMAGE``, with splits train, validation and test.

    Classes may lie in folders of their own within a split (an alphabet, say). Each class gives as
    many images as the smallest of its split has.

    Args:
        root: the folder; at least ``train`` must be there.
        ways, shots, queries: of `from_classes`.
        side: images are made squares of this side.
        color: three channels, not one.

    Returns:
        A `Source` of inputs ``(channels, side, side)`` from 0 to 1, of what eight bits of an image
        can hold; sixteen are rounded to them.

    Raises:
        FileNotFoundError: nothing there, with what to put where.
        ValueError: of `from_classes`; a file that is no image, or whose numbers have no known
            range.
    """
    check_sizes(side=side)
    root = Path(root)
    images = {
        split: _read(root / split, side, color) for split in SPLIT_NAMES if (root / split).is_dir()
    }
    if "train" not in images:
        raise FileNotFoundError(
            f"no images in {root}: put them into {root}/train/CLASS/IMAGE.png, likewise "
            f"validation and test, each class with {shots + queries} images or more"
        )
    return from_classes(
        images, ways=ways, shots=shots, queries=queries, name=root.name, prepare=_inputs
    )


def omniglot(
    root: str | os.PathLike[str] = "data",
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    *,
    side: int = 28,
    download: bool = False,
    validation_alphabets: int = 5,
) -> Source:
    """Omniglot: 1,623 characters of 50 alphabets, each drawn by 20 people.

    Training and validation take the alphabets of its background set, test those of its evaluation
    set. Training classes are also turned by quarters, as is usual: four classes of each.

    Args:
        root: holds ``omniglot-py/images_background/ALPHABET/CHARACTER/*.png`` and likewise
            ``images_evaluation``, as torchvision lays them out.
        ways, shots, queries, side: as of `image_folder`.
        download: get what is missing, by torchvision (the extra ``fmeta[vision]``).
        validation_alphabets: how many of the background alphabets, the last by name, validate.

    Returns:
        A `Source` of inputs ``(1, side, side)``, strokes 1 on 0.

    Raises:
        FileNotFoundError: not there, with what to put where.
        ImportError: ``download`` without torchvision.
        OSError: the download failed.

    Reference:
        Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic
        program induction" (Science 2015).
    """
    check_sizes(side=side)
    base = Path(root) / "omniglot-py"
    parts = {name: base / f"images_{name}" for name in ("background", "evaluation")}
    if download and not all(p.is_dir() for p in parts.values()):
        _download(root)
    for path in parts.values():
        if not path.is_dir():
            raise FileNotFoundError(
                f"no Omniglot in {path}: unzip {path.name}.zip (github.com/brendenlake/omniglot, "
                f"folder python) to {path}/ALPHABET/CHARACTER/*.png, or give download=True (fmeta "
                "fewshot: --download)"
            )
    alphabets = sorted(p for p in parts["background"].iterdir() if p.is_dir())
    if len(alphabets) <= validation_alphabets:
        raise ValueError(
            f"{parts['background']} has {len(alphabets)} alphabets: too few to leave "
            f"{validation_alphabets} for validation; give fewer validation_alphabets"
        )
    cut = len(alphabets) - validation_alphabets
    train = _stacked([f for a in alphabets[:cut] for f in _classes(a)], side, False)
    images = {"train": torch.cat([torch.rot90(train, k, (-2, -1)) for k in range(4)])}
    if validation_alphabets:
        found = [f for a in alphabets[cut:] for f in _classes(a)]
        images["validation"] = _stacked(found, side, False)
    images["test"] = _read(parts["evaluation"], side, False)
    return from_classes(
        {split: 255 - x for split, x in images.items()},  # ink is black there
        ways=ways,
        shots=shots,
        queries=queries,
        name="omniglot",
        prepare=_inputs,
    )


def _download(root: str | os.PathLike[str]) -> None:
    try:
        from torchvision.datasets import Omniglot  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError(
            "to download Omniglot needs torchvision: pip install 'fmeta[vision]'"
        ) from None
    try:
        for background in (True, False):
            Omniglot(str(root), background=background, download=True)
    except RuntimeError as error:  # of a damaged file
        raise OSError(f"Omniglot was not downloaded to {root}: {error}") from None


def _classes(folder: Path) -> list[list[Path]]:
    """The images of every folder below, in order of names, that holds any."""
    found = []
    for path in sorted([folder, *(p for p in folder.rglob("*") if p.is_dir())]):
        images = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS)
        if images:
            found.append(images)
    return found


def _read(folder: Path, side: int, color: bool) -> Tensor:
    classes = _classes(folder)
    if not classes:
        raise FileNotFoundError(f"no images in {folder}: put them into {folder}/CLASS/IMAGE.png")
    return _stacked(classes, side, color)


def _stacked(classes: Sequence[Sequence[Path]], side: int, color: bool) -> Tensor:
    """Bytes ``(classes, instances, channels, side, side)``."""
    from PIL import Image

    least = min(map(len, classes))

    def one(path: Path) -> Any:
        try:
            with Image.open(path) as image:
                fitted = (
                    _in_bytes(image, path)
                    .convert("RGB" if color else "L")
                    .resize((side, side), Image.Resampling.BOX)
                )
        except OSError as error:
            raise ValueError(f"{path} is no image that can be read: {error}") from None
        x = np.asarray(fitted)
        return x.transpose(2, 0, 1) if color else x[None]

    return torch.from_numpy(np.stack([[one(p) for p in images[:least]] for images in classes]))


def _in_bytes(image: Any, path: Path) -> Any:
    """The image with eight bits a number, where it has more: to convert it alone cuts them off."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    # Before Pillow 10.3 a PNG of sixteen bits is of mode I.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(
            f"{path} has numbers of 32 bits, whose black and white are not known: save it with 8 "
            "or 16 bits"
        )
    x = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((x + 128) // 257).astype(np.uint8))


def _inputs(images: Tensor) -> Tensor:
    return images.float() / 255
