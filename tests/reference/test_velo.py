"""velo equals the trajectory of PyLO's plain VeLO (float32, random weights)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fmeta import trees
from fmeta.optimizers import velo

DATA = np.load(Path(__file__).with_name("velo.npz"))
NAMES = ("weight", "bias", "conv")
LINEAR = {
    "mix": "mix_layer2",
    "in": "final_mix_layer",
    "lstm": "lstm.linear",
    "control": "rnn_to_controls",
    "rate": "step_size",
}
LAYERS = ("input_{}_", "hidden_{}_.0", "output_{}_")


def array(key):
    return torch.from_numpy(np.asarray(DATA[key]))


def weights():
    """Matrices ``(in, out)``; the banks' axis stays in front."""
    rnn = {f"{k}_w": array(f"rnn/{theirs}.weight").mT for k, theirs in LINEAR.items()}
    rnn |= {f"{k}_b": array(f"rnn/{theirs}.bias") for k, theirs in LINEAR.items()}
    rnn |= {f"{k}0": array(f"rnn/lstm_init_state.{i}")[0] for i, k in enumerate("hc")}
    mlp = {f"w{i}": array("mlp/" + name.format("weights")).mT for i, name in enumerate(LAYERS)}
    mlp |= {f"b{i}": array("mlp/" + name.format("bias")) for i, name in enumerate(LAYERS)}
    return {"rnn": rnn, "mlp": mlp}


def errors(build=lambda named: named, dtype=torch.float32, **arguments):
    """Largest error over each trajectory, in displacements, after 8 ulp of the parameter.

    ``build`` makes the parameter tree of the tensors by name.
    """
    rule, th = velo(**arguments), trees.cast(weights(), dtype)
    named = lambda key: {k: array(f"{key}/{k}").to(dtype) for k in NAMES}
    start, grads, want = named("init"), named("grads"), named("params")
    # Which leaf is which tensor: a tree of marks goes the same way.
    order = trees.leaves(build({k: torch.tensor(i) for i, k in enumerate(NAMES)}))
    params = build(start)
    hidden = rule.init_hidden(th, params, num_steps=int(DATA["num_steps"]))
    off, moved = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for t in range(20):
        g = build({k: x[t] for k, x in grads.items()})
        params, hidden = rule.step(th, params, g, hidden, loss=array("losses")[t].to(dtype))
        for mark, got in zip(order, trees.leaves(params), strict=True):
            k = NAMES[mark]
            error = (got - want[k][t]).abs() - 8 * 2**-23 * want[k][t].abs()
            off[k] = max(off[k], error.clamp(min=0).max().item())
            moved[k] = max(moved[k], (want[k][t] - start[k]).abs().max().item())
    return {k: off[k] / moved[k] for k in NAMES}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"dtype": torch.float64}, {"chunk_size": 7}, {"chunk_size": 40}],
    ids=["plain", "float64", "tiles of 7", "tiles of 40"],
)
def test_equals_the_original_over_20_steps(arguments):
    for name, error in errors(**arguments).items():
        assert error < 3e-6, name


def test_the_order_of_the_tensors_does_not_matter():
    """The original shows its tensors to the recurrent network in reverse, and reads it so."""
    for build in (lambda n: list(n.values()), lambda n: list(reversed(n.values()))):
        for name, error in errors(build).items():
            assert error < 3e-6, name
