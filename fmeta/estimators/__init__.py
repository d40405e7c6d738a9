"""Estimators of the meta-gradient."""

from fmeta.estimators import meta_losses
from fmeta.estimators._contract import Estimate, Estimator
from fmeta.estimators._es import es
from fmeta.estimators._es_single import es_single
from fmeta.estimators._forward import forward
from fmeta.estimators._full import full
from fmeta.estimators._horizons import constant, growing, log_uniform
from fmeta.estimators._implicit import implicit
from fmeta.estimators._nres import nres
from fmeta.estimators._pes import pes
from fmeta.estimators._score_function import score_function
from fmeta.estimators._truncated import truncated

__all__ = [
    "Estimate",
    "Estimator",
    "constant",
    "es",
    "es_single",
    "forward",
    "full",
    "growing",
    "implicit",
    "log_uniform",
    "meta_losses",
    "nres",
    "pes",
    "score_function",
    "truncated",
]
