"""Evaluations as JSON: everything that tables and figures need, without the full curves."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import _files
from fmeta.evaluate._evaluation import Band, Evaluation, Outcome
from fmeta.evaluate._tune import Search

__all__ = ["Results", "from_dict", "load", "to_dict"]

_FORMAT = 1


class Results(NamedTuple):
    """Evaluations that belong into one file and one figure.

    Attributes:
        evaluations: `Evaluation` by title, such as ``"5 times the horizon"``.
        title: of the figure.
        mark: ``(step, text)`` to mark in it, such as the horizon of meta-training; or None.
    """

    evaluations: dict[str, Evaluation]
    title: str
    mark: tuple[int, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; further entries may be added to them."""
        return {
            "format": _FORMAT,
            "title": self.title,
            "mark": None if self.mark is None else list(self.mark),
            "evaluations": {title: to_dict(e) for title, e in self.evaluations.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes them as a JSON file, atomically."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        # A list of numbers stands on one line.
        text = re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m[0].split()), text)
        _files.write_text(path, text + "\n")


def load(path: str | os.PathLike[str]) -> Results:
    """Reads a JSON file of `Results`, whatever else it holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, or of another program.
    """
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except ValueError:  # of the text, or of its encoding
        raise ValueError(f"{path} is not a whole JSON file: evaluate again") from None
    if not isinstance(value, dict) or not isinstance(value.get("evaluations"), dict):
        raise ValueError(f"{path} holds no evaluations: it is not a file of fmeta.evaluate.Results")
    if value.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {value.get('format')!r}, but this version reads {_FORMAT}"
        )
    mark = value.get("mark")
    try:
        found = {title: from_dict(e) for title, e in value["evaluations"].items()}
        return Results(found, str(value.get("title", "")), None if mark is None else (*mark,))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values, see `Evaluation.to_dict`."""
    names = list(evaluation.outcomes)
    mine = [k for k, o in evaluation.outcomes.items() if o.role == "contender"]
    return {
        "num_steps": evaluation.num_steps,
        "num_seeds": evaluation.num_seeds,
        "seed": evaluation.seed,
        "reference": evaluation.reference,
        "outcomes": {k: _outcome_to(o) for k, o in evaluation.outcomes.items()},
        "summary": {
            name: {q: _plain(evaluation.summary(name, q)) for q in evaluation.quantities}
            for name in names
        },
        "differences": {
            f"{a} - {b}": {
                **{q: _plain(evaluation.paired(a, b, q)) for q in evaluation.quantities},
                **{
                    f"log_{q}": _plain(evaluation.paired(a, b, q, log=True))
                    for q in ("train_loss", "held_out_loss")
                },
            }
            for a in mine
            for b in names
            if a != b
        },
    }


def from_dict(value: Mapping[str, Any]) -> Evaluation:
    """The other way, see `Evaluation.from_dict`."""
    try:
        outcomes = {k: _outcome_from(o) for k, o in value["outcomes"].items()}
        rest = {k: value[k] for k in ("num_steps", "num_seeds", "seed", "reference")}
        return Evaluation(outcomes, **rest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is no whole evaluation: {type(error).__name__} {error}") from None


def _outcome_to(outcome: Outcome) -> dict[str, Any]:
    search = outcome.search
    return {
        "label": outcome.label,
        "role": outcome.role,
        "lr": outcome.lr,
        "search": None
        if search is None
        else {**search._asdict(), "scores": [_number(x) for x in search.scores]},
        "train_loss": _list(outcome.train_loss),
        "held_out_loss": _list(outcome.held_out_loss),
        "metrics": {k: _list(v) for k, v in outcome.metrics.items()},
        "steps": None if outcome.steps is None else _list(outcome.steps),
        "diverged": outcome.diverged.tolist(),
        "train": _band_to(outcome.train),
        "held_out": _band_to(outcome.held_out),
    }


def _outcome_from(value: Mapping[str, Any]) -> Outcome:
    search = value["search"]
    return Outcome(
        label=value["label"],
        role=value["role"],
        train_loss=_tensor(value["train_loss"], math.inf),
        held_out_loss=_tensor(value["held_out_loss"], math.inf),
        metrics={k: _tensor(v, math.nan) for k, v in value["metrics"].items()},
        steps=None if value["steps"] is None else _tensor(value["steps"], math.inf),
        diverged=torch.tensor(value["diverged"], dtype=torch.bool),
        train=_band_from(value["train"]),
        held_out=_band_from(value["held_out"]),
        search=None
        if search is None
        else Search(
            search["rate"],
            tuple(search["rates"]),
            tuple(math.inf if x is None else x for x in search["scores"]),
            search["extended"],
        ),
        lr=value["lr"],
    )


def _band_to(band: Band) -> dict[str, list[Any]]:
    return {k: _list(v) for k, v in band._asdict().items()}


def _band_from(value: Mapping[str, Any]) -> Band:
    return Band(*(_tensor(value[k], math.nan) for k in Band._fields))


def _plain(numbers: Any) -> dict[str, float | None]:
    return {k: _number(v) for k, v in numbers._asdict().items()}


def _list(values: Tensor) -> list[float | None]:
    return [_number(x) for x in values.tolist()]


def _number(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def _tensor(values: list[float | None], absent: float) -> Tensor:
    return torch.tensor([absent if x is None else x for x in values], dtype=torch.float64)
