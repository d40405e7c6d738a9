"""Sources of episodes: what is drawn depends on integers alone, splits share nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from fmeta import fewshot
from fmeta.fewshot import _glyphs

from . import kit


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A few letters of each script stand for all of them: the rest is the same again."""
    root = tmp_path_factory.mktemp("glyphs")
    patch = pytest.MonkeyPatch()
    whole = _glyphs._is_of
    patch.setattr(_glyphs, "_is_of", lambda c, names: c % 16 == 1 and whole(c, names))
    try:
        fewshot.load_glyphs(root)
    finally:
        patch.undo()
    return root


def test_an_episode_is_a_function_of_its_integers():
    source, _ = kit.points()
    a = fewshot.draw(source, [(0, 3), (1, 2)])
    b = fewshot.draw(source, [(1, 2)])
    assert torch.equal(a.support.x[1], b.support.x[0])
    assert not torch.equal(a.support.x[0], a.support.x[1])
    other = fewshot.draw(source, [(1, 2)], split="test")
    assert not torch.equal(b.support.x, other.support.x)


def test_episodes_of_classes_have_what_was_asked_for():
    images = {"train": torch.arange(6 * 9).view(6, 9, 1).double()}
    source = fewshot.from_classes(images, ways=4, shots=2, queries=3)
    for i in range(10):
        episode = fewshot.draw(source, [(i,)])
        support, query = (fewshot.Examples(e.x[0, :, 0], e.y[0]) for e in episode[:2])
        assert support.y.bincount().tolist() == [2] * 4
        assert query.y.bincount().tolist() == [3] * 4
        seen = torch.cat([support.x, query.x])
        assert len(seen.unique()) == 4 * 5
        for part in (support, query):
            assert torch.equal((part.x // 9).long(), episode.classes[0][part.y])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 9}, "8 classes, too few for 9 ways"),
        ({"shots": 10}, "too few for 10 shots and 3 queries"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"shots": 1.5}, "shots must be an integer, got 1.5"),
        ({"ways": True}, "ways must be an integer, got True"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(change, message):
    images = {"train": torch.zeros(8, 12, 2)}
    with pytest.raises(ValueError, match=message):
        fewshot.from_classes(images, **{"ways": 3, "shots": 2, "queries": 3, **change})


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ({}, TypeError, r"\{'train': images, 'test': images\}, got none"),
        (torch.zeros(8, 12, 2), TypeError, "tensors by split.*, got a Tensor"),
        ({"train": np.zeros((8, 12, 2))}, TypeError, "split train .* a ndarray: .*from_numpy"),
        ({"train": torch.zeros(8)}, ValueError, r"must be \(classes, inst.* got shape \(8,\)"),
        ({"training": torch.zeros(8, 12, 2)}, ValueError, "unknown split 'training'"),
        (
            {"train": torch.zeros(8, 12, 2), "test": torch.zeros(8, 12, 3)},
            ValueError,
            r"one shape, got train \(2,\), test \(3,\)",
        ),
    ],
    ids=str,
)
def test_what_are_no_images_by_split_is_told(images, error, message):
    with pytest.raises(error, match=message):
        fewshot.from_classes(images, ways=3, shots=2, queries=3)


def test_points_of_a_wave_are_whole_numbers():
    with pytest.raises(ValueError, match=r"shots must be an integer, got 1\.5"):
        fewshot.sinusoid(1.5)
    drawn = [
        fewshot.draw(fewshot.sinusoid(shots), [(0, 1)]).support.x for shots in (3, np.int64(3))
    ]
    assert torch.equal(*drawn)


def test_a_split_that_is_not_there_is_named():
    source = fewshot.from_classes({"train": torch.zeros(8, 12, 2)}, ways=3, shots=2, queries=3)
    with pytest.raises(ValueError, match="no split 'test': there are train"):
        fewshot.draw(source, [(0,)], split="test")


def test_waves_are_sines():
    episodes = fewshot.draw(fewshot.sinusoid(10, 200), [(0, i) for i in range(20)])
    x, y = episodes.query
    assert x.min() >= -5
    assert x.max() <= 5
    design = torch.cat([x.sin(), x.cos()], -1)
    fitted = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(design @ fitted, y, rtol=1e-4, atol=1e-4)
    amplitude = fitted.square().sum((1, 2)).sqrt()
    assert amplitude.min() >= 0.1 - 1e-3
    assert amplitude.max() <= 5 + 1e-3


def test_glyphs_of_splits_are_of_different_scripts_and_no_character_is_in_two(cache):
    found = fewshot.load_glyphs(cache)
    names = {split: {n.split()[0] for n in part.names} for split, part in found.items()}
    assert names == {
        "train": {"LATIN", "GREEK"},
        "validation": {"CYRILLIC"},
        "test": {"ARMENIAN", "GEORGIAN"},
    }
    every = [n for part in found.values() for n in part.names]
    assert len(set(every)) == len(every)
    assert "GREEK CAPITAL LETTER ALPHA" not in every  # is a Latin A
    for part in found.values():
        assert part.images.shape[1:] == (24, 28, 28)
        assert part.images.dtype == torch.uint8
        assert (part.images.flatten(2).float().mean(-1) > 2).all()


def test_glyphs_are_built_once_and_the_same_again(cache, tmp_path, monkeypatch):
    whole = _glyphs._is_of
    with monkeypatch.context() as patch:
        patch.setattr(_glyphs, "_is_of", lambda c, names: c % 16 == 1 and whole(c, names))
        again = fewshot.load_glyphs(tmp_path)
    before = fewshot.load_glyphs(cache)
    assert all(torch.equal(again[s].images, before[s].images) for s in before)
    monkeypatch.setattr(_glyphs, "_build", lambda progress: pytest.fail("built again"))
    fewshot.load_glyphs(cache)


def test_a_damaged_cache_is_told(cache, tmp_path):
    whole = next(cache.glob("glyphs-*.npz"))
    for content in (whole.read_bytes()[:5000], b"", b"no archive"):
        (tmp_path / whole.name).write_bytes(content)
        with pytest.raises(ValueError, match=r"glyphs-.*npz is damaged .*: delete it"):
            fewshot.load_glyphs(tmp_path)


def test_a_contact_sheet_shows_every_split(cache, tmp_path):
    fewshot.contact_sheet(tmp_path / "sheet.png", fewshot.load_glyphs(cache), rows=3)
    with Image.open(tmp_path / "sheet.png") as image:
        assert np.asarray(image.convert("L")).min() < 50  # ink


def test_equal_bitmaps_in_most_styles_are_one_character():
    seen = _glyphs._Seen()
    images = np.random.default_rng(0).integers(0, 255, (12, 4, 4), np.uint8)
    assert seen.is_new(images)
    near, far = images.copy(), images.copy()
    near[:5] += 1
    far[:7] += 1
    assert not seen.is_new(near)
    assert seen.is_new(far)


@pytest.mark.slow
def test_all_glyphs_are_many_and_hard(tmp_path):
    found = fewshot.load_glyphs(tmp_path)
    assert sum(len(part.names) for part in found.values()) >= 1000
    learner, source = fewshot.nearest_neighbour(5), fewshot.glyphs(root=tmp_path)
    for split in found:
        scores = fewshot.evaluate(learner, {}, source, num_episodes=300, split=split)
        mean, half = scores.accuracy()
        assert mean + half < 0.65
        assert mean - half > 0.3


@pytest.mark.slow
def test_few_glyphs_look_like_a_class_of_training():
    """As docs/howto/few_shot.md counts them."""
    fonts, seen = _glyphs._fonts(), _glyphs._Seen()
    found = {split: [] for split in _glyphs.SCRIPTS}
    for split, scripts in _glyphs.SCRIPTS.items():
        for c in sorted(set.intersection(*(set(font.get_charmap()) for font in fonts))):
            if _glyphs._is_of(c, scripts):
                images = np.stack([_glyphs._rendered(font, c) for font in fonts])
                if images.any() and seen.is_new(images):
                    found[split].append(images.reshape(12, -1).astype(np.int16))
    train = np.stack(found.pop("train"))
    alike = {split: 0 for split in found}
    for split, characters in found.items():
        for images in characters:
            apart = np.abs(train - images)
            assert 2 * (apart.max(-1) == 0).sum(-1).max() < 12
            near = apart.sum(-1, dtype=np.int64) < 0.1 * images.sum(-1, dtype=np.int64)
            alike[split] += bool((2 * near.sum(-1) >= 12).any())
    assert alike == {"validation": 7, "test": 8}
    assert {split: len(x) for split, x in found.items()} == {"validation": 124, "test": 120}


def images_in(folder, classes, each, side=10):
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(each):
            shade = np.full((side, side), 20 * c + i, np.uint8)
            Image.fromarray(shade).save(folder / f"class{c}" / f"{i:02d}.png")


def test_a_folder_of_images_gives_its_classes(tmp_path):
    images_in(tmp_path / "train", 4, 5)
    images_in(tmp_path / "test", 3, 6)
    source = fewshot.image_folder(tmp_path, ways=3, shots=2, queries=2, side=6)
    assert source.shape == (1, 6, 6)
    episode = fewshot.draw(source, [(0,)], split="test")
    shades = (255 * episode.support.x[0, :, 0, 0, 0]).round().long()
    assert torch.equal(shades // 20, episode.classes[0][episode.support.y[0]])
    color = fewshot.image_folder(tmp_path, ways=3, shots=2, queries=2, side=6, color=True)
    assert color.shape == (3, 6, 6)


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize(("dtype", "ending"), [("<u2", "png"), ("<u2", "tif"), (">u2", "tif")])
def test_images_of_sixteen_bits_are_as_dark_as_those_of_eight(tmp_path, dtype, ending, color):
    ramp = np.linspace(0, 255, 16).astype(np.uint8)[None].repeat(16, 0)
    for name, x, end in (("eight", ramp, "png"), ("sixteen", (ramp * 257.0).astype(dtype), ending)):
        (tmp_path / name / "train" / "a").mkdir(parents=True)
        for i in range(2):
            Image.fromarray(x).save(tmp_path / name / "train" / "a" / f"{i}.{end}")
    eight, sixteen = (
        fewshot.draw(
            fewshot.image_folder(tmp_path / name, ways=1, shots=1, queries=1, side=16, color=color),
            [(0,)],
        ).support.x
        for name in ("eight", "sixteen")
    )
    assert len(eight.unique()) == 16
    assert torch.equal(eight, sixteen)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_images_whose_white_is_not_known_are_refused(tmp_path, dtype):
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "train" / "a" / "b.tif")
    with pytest.raises(ValueError, match=r"b\.tif has numbers of 32 bits.*8 or 16 bits"):
        fewshot.image_folder(tmp_path)


def test_a_missing_folder_says_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train/CLASS/IMAGE\.png"):
        fewshot.image_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ALPHABET/CHARACTER/\*\.png"):
        fewshot.omniglot(tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "b.png").write_text("none")
    with pytest.raises(ValueError, match=r"b\.png is no image"):
        fewshot.image_folder(tmp_path)


def test_omniglot_is_read_from_its_layout(tmp_path):
    base = tmp_path / "omniglot-py"
    for alphabet in ("Greek", "Korean", "Latin"):
        images_in(base / "images_background" / alphabet, 2, 5)
    images_in(base / "images_evaluation" / "Angelic", 3, 5)
    source = fewshot.omniglot(tmp_path, ways=2, shots=1, queries=2, side=8, validation_alphabets=1)
    drawn = {
        split: {int(c) for i in range(40) for c in fewshot.draw(source, [(i,)], split=split)[2][0]}
        for split in ("train", "validation", "test")
    }
    assert {split: len(found) for split, found in drawn.items()} == {
        "train": 2 * 2 * 4,
        "validation": 2,
        "test": 3,
    }
    episode = fewshot.draw(source, [(0,)], split="test")
    assert episode.support.x.min() > 0.7  # almost black there is almost 1 here
