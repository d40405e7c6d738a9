"""Wrappers and schedules equal optax 0.2.8 (float64 arrays, 9 updates of adam(0.1) or sgd(0.1))."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fmeta
from fmeta import schedules
from fmeta.optimizers import adam, sgd

DATA = np.load(Path(__file__).with_name("optax_wrappers.npz"))
NAMES, STEPS = ("w", "b"), 9


def arrays(prefix):
    return {k: torch.from_numpy(DATA[f"{prefix}/{k}"]) for k in NAMES}


def gradients(bad=False):
    """Those of optax's runs; with ``bad``, one element of b is NaN at some updates."""
    g = arrays("g")
    if bad:
        g["b"][torch.from_numpy(DATA["bad"]), 1] = torch.nan
    return [{k: x[t] for k, x in g.items()} for t in range(STEPS)]


def trajectory(rule, grads):
    params = arrays("p0")
    th = rule.init()
    rows = [(params, rule.init_hidden(th, params))]
    for g in grads:
        rows.append(rule.step(th, rows[-1][0], g, rows[-1][1]))
    return rows[1:]


def check(rows, name, tol=1e-12):
    for key, want in arrays(name).items():
        got = torch.stack([row[key] for row in rows])
        torch.testing.assert_close(got, want, rtol=tol, atol=tol, equal_nan=True)


@pytest.mark.parametrize("limit", [2, 10])
def test_apply_if_finite(limit):
    rows = trajectory(fmeta.apply_if_finite(adam(0.1), limit), gradients(bad=True))
    check([p for p, _ in rows], f"finite{limit}")
    if limit == 10:
        assert rows[-1][1].shared["skipped"] == int(DATA["total"])
        assert rows[-1][1].shared["consecutive"] == int(DATA["consec"])


def test_accumulate_is_multi_steps():
    rows = trajectory(fmeta.accumulate(adam(0.1), 4), gradients())
    check([p for p, _ in rows], "multi", tol=1e-7)  # optax divides by the count in float32


def test_lookahead():
    rule = fmeta.lookahead(adam(0.1), every=3, slow_rate=0.4)
    rows = trajectory(rule, gradients())
    check([p for p, _ in rows], "look")
    check([rule.eval_params({}, *row) for row in rows], "look_slow")


def test_clip_by_value_is_clip():
    rows = trajectory(fmeta.chain(fmeta.clip_by_value(0.5), sgd(0.1)), gradients())
    check([p for p, _ in rows], "clip")


def test_the_debiased_average_is_ema():
    rule, values = fmeta.averaged(sgd(1.0), 0.7), arrays("g")["b"]
    p = torch.zeros(3, dtype=torch.float64)
    h = rule.init_hidden({}, p)
    for value, want in zip(values, torch.from_numpy(DATA["ema"]), strict=True):
        p, h = rule.step({}, p, p - value, h)
        torch.testing.assert_close(rule.eval_params({}, p, h), want, rtol=1e-12, atol=1e-12)


SCHEDULES = {
    "cos": schedules.cosine(0.1, steps=10),
    "wc": schedules.warmup_cosine(3, 0.05, steps=11, start=0.2),
    "lin": schedules.linear(0.2, 0.8, steps=7),
    "pc": schedules.piecewise([3, 8], [1.0, 0.5, 0.1]),
    "join": schedules.join([schedules.warmup(4), schedules.cosine(steps=6)], [4]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    want = torch.from_numpy(DATA[f"schedule/{name}"])
    got = SCHEDULES[name](torch.arange(len(want), dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
