"""Muon equals the trajectories of optax.contrib.muon (float32)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fmeta import optimizers

DATA = np.load(Path(__file__).with_name("optax.npz"))
# optax orthogonalises matrices only and gives "k", of three axes, to AdamW: so does a flat tensor.
SHAPES = {"b": (3,), "k": (24,), "q": (4, 4), "s": (), "w": (5, 3)}


def arrays(prefix, *leading):
    return {
        name: torch.from_numpy(np.asarray(DATA[f"{prefix}/{name}"]))
        .double()
        .reshape((*leading, *shape))
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def errors():
    """The largest error of each tensor's trajectory, as a share of its largest displacement."""
    rule = optimizers.muon(0.02, weight_decay=0.1, layout="in_out")
    start, grads, want = arrays("p0"), arrays("grad", 20), arrays("muon", 20)
    params, hidden = start, rule.init_hidden({}, start)
    found = dict.fromkeys(SHAPES, 0.0)
    for t in range(20):
        params, hidden = rule.step({}, params, {k: g[t] for k, g in grads.items()}, hidden)
        for name in SHAPES:
            moved = (want[name] - start[name]).abs().max()
            error = (params[name] - want[name][t]).abs().max() / moved
            found[name] = max(found[name], float(error))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_equals_optax_over_20_steps(errors, name):
    assert errors[name] < 3e-5
