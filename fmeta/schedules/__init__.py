"""Factors that depend on time, for `fmeta.scheduled`: pure functions of step and horizon."""

from fmeta.schedules._combine import join, product, relative
from fmeta.schedules._curves import constant, cosine, linear, piecewise, warmup, warmup_cosine
from fmeta.schedules._schedule import Schedule

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "join",
    "linear",
    "piecewise",
    "product",
    "relative",
    "warmup",
    "warmup_cosine",
]
