"""Hand-made rules equal optax's over 20 steps in float32, every array of the file."""

from pathlib import Path

import numpy as np
import pytest

import fmeta
from fmeta.optimizers import (
    adabelief,
    adafactor,
    adagrad,
    adam,
    adamax,
    adamw,
    lamb,
    lars,
    lion,
    muon,
    nadam,
    nadamw,
    radam,
    rmsprop,
    sgd,
    yogi,
)

from .trajectory import copies, errors, first, run, sub, tensors

DATA = np.load(Path(__file__).with_name("optax.npz"))

# As optax.contrib.muon: whatever is no matrix goes to AdamW with Nesterov's momentum.
PARTS = {
    "muon": muon(0.02, weight_decay=0.1, layout="in_out"),
    "rest": nadamw(0.02, weight_decay=0.0),
}

RULES = {
    "sgd": sgd(0.05),
    "sgd_momentum": sgd(0.05, 0.9),
    "sgd_nesterov": sgd(0.05, 0.9, nesterov=True),
    "adam": adam(0.01),
    "adam_epsroot": adam(0.01, eps_root=1e-8),
    "nadam": nadam(0.01, momentum_decay=None),
    "adamw": adamw(0.01, weight_decay=0.1),
    "rmsprop": rmsprop(0.01, 0.9, eps=0.0, eps_root=1e-8),
    "rmsprop_torchlike": rmsprop(0.01),
    "rmsprop_centered_momentum": rmsprop(
        0.01, 0.9, eps=0.0, momentum=0.9, centered=True, eps_root=1e-8, nesterov=True
    ),
    "adagrad": adagrad(0.1, initial_accumulator_value=0.1, eps=0.0, eps_root=1e-7),
    "adabelief": adabelief(0.01),
    "yogi": yogi(0.01),
    "radam": radam(0.01, corrected_eps=True),
    "adamax": adamax(0.01),
    "lion": lion(0.01, weight_decay=0.1),
    "adafactor": adafactor(0.1),
    "adafactor_factored": adafactor(0.1, min_dim_size_to_factor=2),
    "adafactor_full": adafactor(
        0.1, 2, momentum=0.9, weight_decay=0.01, multiply_by_parameter_scale=False
    ),
    "lamb": lamb(0.01, weight_decay=0.1),
    "lars": lars(0.1, weight_decay=0.01),
    "muon": fmeta.partition(PARTS, lambda path, x: "muon" if x.ndim == 2 else "rest"),
}
# Arguments that should make no difference that counts here.
SAME = {
    "nadam": {"as nadamw": nadamw(0.01, weight_decay=0.0)},
    "radam": {"with torch's eps": radam(0.01)},
}
CASES = [(name, "", rule) for name, rule in RULES.items()] + [
    (name, how, rule) for name, others in SAME.items() for how, rule in others.items()
]


IDS = [f"{name} {how}".strip() for name, how, _ in CASES]


@pytest.mark.parametrize(("name", "how", "rule"), CASES, ids=IDS)
def test_parameters_of_20_steps(name, how, rule):
    start, grads, want = (tensors(sub(DATA, k)) for k in ("p0/", "grad/", f"{name}/"))
    path, _ = run(rule, rule.init(), start, grads)
    assert len(want) == 5
    for tensor, error in errors(start, want, path).items():
        assert error < 3e-5, tensor


@pytest.mark.parametrize(("name", "how", "rule"), CASES, ids=IDS)
def test_many_leaves_of_each_shape_go_as_one(name, how, rule):
    """The lift stacks them; all but the first of each shape are scaled."""
    start, grads, want = (tensors(sub(DATA, k)) for k in ("p0/", "grad/", f"{name}/"))
    path, _ = run(rule, rule.init(), copies(start, 5), copies(grads, 5))
    for tensor, error in errors(start, want, first(path)).items():
        assert error < 3e-5, tensor


def test_every_array_is_tried():
    assert {k.split("/")[0] for k in DATA.files} - {"p0", "grad"} == set(RULES)
