"""Figures."""

from fmeta.plot._curves import curves
from fmeta.plot._evaluation import evaluations
from fmeta.plot._meta_training import meta_training

__all__ = ["curves", "evaluations", "meta_training"]
