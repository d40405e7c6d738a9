"""Optimizers by name: hand-made baselines and learned rules, all of one type."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from fmeta.optimizer import Optimizer
from fmeta.optimizers._adabelief import adabelief
from fmeta.optimizers._adafactor import adafactor
from fmeta.optimizers._adafactor_mlp import adafactor_mlp
from fmeta.optimizers._adagrad import adagrad
from fmeta.optimizers._adam import adam, adamw
from fmeta.optimizers._adamax import adamax
from fmeta.optimizers._basis_mlp import basis_mlp
from fmeta.optimizers._hebbian_mlp import hebbian_mlp
from fmeta.optimizers._lamb import lamb
from fmeta.optimizers._lars import lars
from fmeta.optimizers._linear import linear
from fmeta.optimizers._lion import lion
from fmeta.optimizers._lstm import lstm
from fmeta.optimizers._meta_curvature import meta_curvature
from fmeta.optimizers._meta_lstm import meta_lstm
from fmeta.optimizers._mlp import mlp
from fmeta.optimizers._muon import muon
from fmeta.optimizers._nadam import nadam, nadamw
from fmeta.optimizers._nn_adam import nn_adam
from fmeta.optimizers._normalized_mlp import normalized_mlp
from fmeta.optimizers._radam import radam
from fmeta.optimizers._rmsprop import rmsprop
from fmeta.optimizers._rnn_mlp import rnn_mlp
from fmeta.optimizers._schedule_free import schedule_free_adamw
from fmeta.optimizers._sgd import per_parameter_sgd, sgd
from fmeta.optimizers._velo import velo
from fmeta.optimizers._yogi import yogi

__all__ = [
    "BUILDERS",
    "adabelief",
    "adafactor",
    "adafactor_mlp",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "basis_mlp",
    "get",
    "hebbian_mlp",
    "lamb",
    "lars",
    "linear",
    "lion",
    "lstm",
    "meta_curvature",
    "meta_lstm",
    "muon",
    "nadam",
    "nadamw",
    "nn_adam",
    "normalized_mlp",
    "per_parameter_sgd",
    "radam",
    "rmsprop",
    "rnn_mlp",
    "schedule_free_adamw",
    "sgd",
    "velo",
    "yogi",
]

# Every builder by its name. All can be called without arguments, but for `per_parameter_sgd` and
# `meta_curvature`, which take the parameter tree first.
BUILDERS: dict[str, Callable[..., Optimizer]] = {
    f.__name__: f
    for f in (
        sgd,
        adagrad,
        rmsprop,
        adam,
        adamw,
        nadam,
        nadamw,
        radam,
        adamax,
        adabelief,
        yogi,
        lion,
        adafactor,
        lars,
        lamb,
        schedule_free_adamw,
        muon,
        per_parameter_sgd,
        meta_curvature,
        linear,
        lstm,
        meta_lstm,
        mlp,
        adafactor_mlp,
        normalized_mlp,
        basis_mlp,
        velo,
        rnn_mlp,
        nn_adam,
        hebbian_mlp,
    )
}


def get(name: str) -> Callable[..., Optimizer]:
    """The builder of that name.

    Raises:
        ValueError: for an unknown name, with those that are near and all that there are.
    """
    if name in BUILDERS:
        return BUILDERS[name]
    near = difflib.get_close_matches(name, BUILDERS, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"unknown optimizer {name!r}: {hint}there are {', '.join(BUILDERS)}")
