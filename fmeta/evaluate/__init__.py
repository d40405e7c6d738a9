"""Optimizers side by side: same initial parameters, same batches, several seeds."""

from fmeta.evaluate._baselines import BASELINES, Baseline, cosine, get_baselines
from fmeta.evaluate._compare import Curves, compare
from fmeta.evaluate._evaluation import Band, Evaluation, Outcome
from fmeta.evaluate._json import Results, load
from fmeta.evaluate._run import run
from fmeta.evaluate._statistics import (
    Difference,
    Summary,
    final_loss,
    paired_difference,
    steps_to_reach,
)
from fmeta.evaluate._tune import Search, search_rates, tune

__all__ = [
    "BASELINES",
    "Band",
    "Baseline",
    "Curves",
    "Difference",
    "Evaluation",
    "Outcome",
    "Results",
    "Search",
    "Summary",
    "compare",
    "cosine",
    "final_loss",
    "get_baselines",
    "load",
    "paired_difference",
    "run",
    "search_rates",
    "steps_to_reach",
    "tune",
]
