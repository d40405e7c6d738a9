"""Few-shot characters from the fonts that come with matplotlib."""

from __future__ import annotations

import collections
import hashlib
import io
import os
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmeta import _files
from fmeta.fewshot._distort import distorted
from fmeta.fewshot._source import Source, from_classes

__all__ = ["SCRIPTS", "Glyphs", "contact_sheet", "glyphs", "load_glyphs"]

# Scripts of each split. A character that several scripts have (A, Alpha, the Cyrillic A) is of the
# first.
SCRIPTS = {
    "train": ("LATIN", "GREEK"),
    "validation": ("CYRILLIC",),
    "test": ("ARMENIAN", "GEORGIAN"),
}
STYLES = tuple(
    f"DejaVu{family}{style}.ttf"
    for family, styles in (
        ("Sans", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("SansMono", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("Serif", ("", "-Bold", "-Italic", "-BoldItalic")),
    )
    for style in styles
)
COPIES = 2  # differently distorted images of a style: as many instances as 15 queries and 9 shots
LARGE, SIDE = 56, 28
_VERSION = 1


class Glyphs(NamedTuple):
    """Characters of one split.

    Attributes:
        images: bytes, ``(classes, 24, 28, 28)``: twelve styles, each distorted twice.
        names: of the classes, as Unicode names their first character.
    """

    images: Tensor
    names: tuple[str, ...]


def glyphs(
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    *,
    root: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Source:
    """Episodes of characters whose scripts differ between training, validation and test.

    More than 1,000 letters that all twelve DejaVu styles have: Latin and Greek to train,
    Cyrillic to validate, Armenian and Georgian to test. Every image is distorted by a seeded affine
    and elastic map and in the width of its strokes, so that pixels alone do not tell.

    Characters with equal bitmaps in half of the styles are one class, of the first script. A few
    that look alike, though not equal in so many styles, are in two splits: 8 of 120 test classes
    are within a tenth of their ink of a training class, in half of the styles.

    Args:
        ways, shots, queries: of `from_classes`.
        root: folder of the cache; default ``$FMETA_CACHE``, or ``fmeta`` in the user's cache. It
            is built once, in about half a minute.
        progress: show a progress bar meanwhile.

    Returns:
        A `Source` of inputs ``(1, 28, 28)`` from 0 to 1.

    Raises:
        ValueError: of `from_classes`.
        OSError: the cache cannot be written.
    """
    found = load_glyphs(root, progress=progress)
    images = {split: part.images for split, part in found.items()}
    return from_classes(
        images, ways=ways, shots=shots, queries=queries, name="glyphs", prepare=_inputs
    )


def load_glyphs(
    root: str | os.PathLike[str] | None = None, *, progress: bool = False
) -> dict[str, Glyphs]:
    """The characters by split, from the cache or, the first time, from the fonts.

    Args:
        root, progress: as of `glyphs`.
    """
    import matplotlib

    # Other fonts or another renderer would be other images.
    digest = hashlib.blake2b(digest_size=6)
    for part in (_VERSION, matplotlib.__version__, SCRIPTS, STYLES, COPIES, LARGE, SIDE):
        digest.update(repr(part).encode())
    path = _folder(root) / f"glyphs-{digest.hexdigest()}.npz"
    if not path.exists():
        _write(path, _build(progress))
    try:
        with open(path, "rb") as file, np.load(file) as held:  # which is left open by an error
            return {
                split: Glyphs(torch.from_numpy(held[split]), tuple(held[f"{split}/names"].tolist()))
                for split in SCRIPTS
            }
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, it is built again") from None


def contact_sheet(
    path: str | os.PathLike[str], found: Mapping[str, Glyphs], *, rows: int = 12
) -> None:
    """Draws some classes of each split, a row each with all their images, into a PNG to look at.

    Args:
        path: of the file.
        found: what `load_glyphs` gave.
        rows: classes of a split, evenly over all of them.
    """
    from matplotlib.figure import Figure

    from fmeta.plot._figure import write

    figure = Figure(figsize=(10, 0.45 * rows * len(found)), layout="constrained")
    for axis, (split, part) in zip(figure.subplots(len(found), 1), found.items(), strict=True):
        pick = torch.linspace(0, len(part.images) - 1, rows).long()
        shown = part.images[pick]
        sheet = shown.permute(0, 2, 1, 3).reshape(len(pick) * SIDE, shown.shape[1] * SIDE)
        axis.imshow(sheet.numpy(), cmap="gray_r")
        axis.set_title(f"{split}: {len(part.names)} classes", fontsize=9)
        axis.set_axis_off()
    write(path, figure)


def _folder(root: str | os.PathLike[str] | None) -> Path:
    chosen = root or os.environ.get("FMETA_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmeta"


def _inputs(images: Tensor) -> Tensor:
    return images.float().unsqueeze(-3) / 255


def _write(path: Path, found: dict[str, Glyphs]) -> None:
    arrays: dict[str, Any] = {}
    for split, part in found.items():
        arrays[split] = part.images.numpy()
        arrays[f"{split}/names"] = np.array(part.names)
    _files.writable_folder(path.parent)
    held = io.BytesIO()
    np.savez_compressed(held, **arrays)
    _files.write_bytes(path, held.getvalue())


def _build(progress: bool) -> dict[str, Glyphs]:
    fonts = _fonts()
    shared = sorted(set.intersection(*(set(font.get_charmap()) for font in fonts)))
    wanted = [(split, c) for split, names in SCRIPTS.items() for c in shared if _is_of(c, names)]
    seen = _Seen()
    large: dict[str, list[Any]] = {split: [] for split in SCRIPTS}
    names: dict[str, list[str]] = {split: [] for split in SCRIPTS}
    with _bar(progress, len(wanted)) as tick:
        for split, c in wanted:
            images = np.stack([_rendered(font, c) for font in fonts])
            if images.any() and seen.is_new(images):
                large[split].append(images)
                names[split].append(unicodedata.name(chr(c)))
            tick()
    return {
        split: Glyphs(distorted(np.stack(large[split]), COPIES, SIDE, i), tuple(names[split]))
        for i, split in enumerate(SCRIPTS)
    }


class _Seen:
    """Which characters are one: those with equal bitmaps in half of the styles or more.

    Not in all: fonts draw the same letter of two scripts with a difference in a style or two.
    """

    def __init__(self) -> None:
        self.count = 0
        self.found: dict[tuple[int, bytes], list[int]] = {}

    def is_new(self, images: np.ndarray[Any, Any]) -> bool:
        keys = [(i, image.tobytes()) for i, image in enumerate(images)]
        equal = collections.Counter(c for key in keys for c in self.found.get(key, ()))
        if equal and 2 * max(equal.values()) >= len(keys):
            return False
        for key in keys:
            self.found.setdefault(key, []).append(self.count)
        self.count += 1
        return True


def _is_of(c: int, scripts: tuple[str, ...]) -> bool:
    character = chr(c)
    if not unicodedata.category(character).startswith("L"):
        return False
    return unicodedata.name(character, "").split(" ")[0] in scripts


def _fonts() -> list[Any]:
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [FT2Font(str(folder / name)) for name in STYLES]


def _rendered(font: Any, c: int) -> np.ndarray[Any, Any]:
    """The character in the middle of a square, as large as its side allows."""
    from matplotlib import ft2font

    # Named otherwise before matplotlib 3.10.
    known: Any = getattr(ft2font, "LoadFlags", None)
    flags = known.NO_HINTING if known else getattr(ft2font, "LOAD_NO_HINTING")  # noqa: B009
    # Hints of the fonts draw one letter of two scripts differently.
    size = 0.8 * LARGE
    font.set_size(size, 72)
    font.set_text(chr(c), 0.0, flags=flags)
    font.draw_glyphs_to_bitmap()
    image = np.asarray(font.get_image())
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    square = np.zeros((LARGE, LARGE), np.uint8)
    if not len(rows):
        return square
    image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = image[:LARGE, :LARGE]
    top, left = ((LARGE - n) // 2 for n in image.shape)
    square[top : top + image.shape[0], left : left + image.shape[1]] = image
    return square


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[Callable[[], None]]:
    if not progress:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing glyphs (once)", total=total)
        yield lambda: bar.advance(task)
