"""Learned hyper-parameters equal the trajectories of google/learned_optimization (float32)."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fmeta
from fmeta import optimizers

DATA = np.load(Path(__file__).with_name("learnable_hparams.npz"))
NAMES = sorted(key.removeprefix("p0/") for key in DATA.files if key.startswith("p0/"))


def array(key):
    return torch.from_numpy(np.asarray(DATA[key]))


def adam(theta):
    rule = fmeta.learn(
        optimizers.adam,
        {"lr": "log", "betas": "log1m", "eps": "log"},
        lr=1e-2,
        eps_root=1e-8,
    )
    return rule, {
        "lr": theta("log_lr"),
        "betas": (theta("one_minus_beta1"), theta("one_minus_beta2")),
        "eps": theta("log_epsilon"),
    }


def sgdm(theta):
    rule = fmeta.learn(optimizers.sgd, {"lr": "log", "momentum": "log1m"}, lr=1e-2, momentum=0.9)
    return rule, {"lr": theta("log_lr"), "momentum": theta("one_minus_momentum")}


def sgd(theta):
    return fmeta.learn(optimizers.sgd, {"lr": "log"}, lr=1e-2), {"lr": theta("log_lr")}


RULES = {"adam": adam, "sgdm": sgdm, "sgd": sgd}
CASES = sorted({tuple(k.split("/")[:-2]) for k in DATA.files if "/theta/" in k})


def test_the_file_holds_the_three_rules():
    assert {name for case in CASES for name in RULES if name in case} == set(RULES)


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_equals_the_reference(case):
    """3e-5 of a tensor's largest displacement, after forgiving 8 ulp of the parameter itself."""
    prefix = "/".join(case)
    rule, theta = RULES[next(n for n in case if n in RULES)](lambda n: array(f"{prefix}/theta/{n}"))
    start = {name: array(f"p0/{name}") for name in NAMES}
    params, hidden = start, rule.init_hidden(theta, start, num_steps=20)
    errors = dict.fromkeys(NAMES, 0.0)
    for t in range(20):
        grads = {name: array(f"grad/{name}")[t] for name in NAMES}
        params, hidden = rule.step(theta, params, grads, hidden)
        for name in NAMES:
            want = array(f"{prefix}/params/{name}")[t]
            spare = 8 * np.spacing(np.abs(want.numpy()))
            error = (params[name] - want).abs() - torch.as_tensor(spare)
            errors[name] = max(errors[name], float(error.max()))
    for name in NAMES:
        moved = float((array(f"{prefix}/params/{name}") - start[name]).abs().max())
        assert errors[name] <= 3e-5 * moved, name


@pytest.mark.parametrize("name", RULES)
def test_the_start_values_are_the_references(name):
    case = next(c for c in CASES if name in c and ("init" in c or len(c) == 1))
    rule, theta = RULES[name](lambda n: array(f"{'/'.join(case)}/theta/{n}"))
    for got, want in zip(fmeta.trees.leaves(rule.init()), fmeta.trees.leaves(theta), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
