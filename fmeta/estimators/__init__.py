"""Estimators of the meta-gradient."""

from fmeta.estimators._contract import Estimate, Estimator
from fmeta.estimators._full import full
from fmeta.estimators._pes import pes
from fmeta.estimators._truncated import truncated

__all__ = ["Estimate", "Estimator", "full", "pes", "truncated"]
