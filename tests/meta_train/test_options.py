"""One dataclass is the configuration: from a file, checked; as a table, complete."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from fmeta.meta_train import TrainConfig, options_table, read_config

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "meta_train.md"


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration of each kind of field."""

    steps: int = 3
    """How many."""
    rate: float = 0.5
    """How fast,
    or slow."""
    name: str | None = None
    """Whose."""
    widths: tuple[int, ...] = (8,)
    """Of each layer."""
    model: Literal["mlp", "cnn"] = "mlp"
    """Which."""
    quick: bool = False
    """Whether."""


def read(tmp_path, value):
    path = tmp_path / "c.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return read_config(path, Config())


def test_a_file_may_be_partial(tmp_path):
    assert read(tmp_path, {}) == Config()
    assert read(tmp_path, {"steps": 5, "widths": [4, 2]}) == Config(steps=5, widths=(4, 2))


def test_a_whole_one_comes_back(tmp_path):
    config = Config(1, 2.0, "x", (1, 2, 3), "cnn", True)
    assert read(tmp_path, dataclasses.asdict(config)) == config


def test_an_integer_stands_for_a_float(tmp_path):
    assert isinstance(read(tmp_path, {"rate": 1}).rate, float)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"setps": 5}, "unknown option 'setps': did you mean steps?"),
        ({"zzz": 5}, "unknown option 'zzz': did you mean steps, rate, name"),
        ({"steps": 1.5}, "'steps' must be of type int, got 1.5"),
        ({"steps": True}, "'steps' must be of type int, got True"),
        ({"steps": None}, "'steps' must be of type int, got None"),
        ({"rate": "fast"}, "'rate' must be of type float, got 'fast'"),
        ({"name": 3}, r"'name' must be of type str \| None, got 3"),
        ({"widths": 8}, "'widths' must be of type .*int.*, got 8"),
        ({"widths": [8, "x"]}, "'widths' must be of type"),
        ({"model": "rnn"}, "'model' must be of type .*'mlp', 'cnn'"),
        ({"quick": 1}, "'quick' must be of type bool, got 1"),
        ([1], "must hold one JSON object"),
        ('{"steps": ', "is not a whole JSON file"),
        ("", "is not a whole JSON file"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_what_is_wrong(tmp_path, value, words):
    with pytest.raises(ValueError, match=words) as error:
        read(tmp_path, value)
    assert "c.json" in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.json"):
        read_config(tmp_path / "none.json", Config())


def test_the_table_has_a_row_for_each_option():
    rows = options_table(Config).splitlines()[2:]
    assert rows[0] == "| `--steps` | int | `3` | How many. |"
    assert rows[1] == "| `--rate` | float | `0.5` | How fast, or slow. |"
    assert rows[2].startswith("| `--name` | str \\| None | `None` |")
    assert len(rows) == len(dataclasses.fields(Config))


def test_an_option_without_a_word_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Silent:
        x: int = 1

    with pytest.raises(ValueError, match=r"Silent\.x has no docstring: say what it does"):
        options_table(Silent)


def test_the_page_shows_the_options_of_fmeta_train():
    table = options_table(TrainConfig)
    assert table in PAGE.read_text(), (
        "paste into the page what this prints: python -c 'from fmeta.meta_train import *; "
        "print(options_table(TrainConfig))'"
    )
