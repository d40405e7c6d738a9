"""Estimators of the meta-gradient."""

from fmeta.estimators._contract import Estimate, Estimator
from fmeta.estimators._full import full

__all__ = ["Estimate", "Estimator", "full"]
