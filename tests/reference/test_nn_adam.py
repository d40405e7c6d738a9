"""nn_adam equals the trajectories and states of google's NNAdam (float32)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fmeta import pretrained, trees
from fmeta.optimizers import nn_adam

DATA = np.load(Path(__file__).with_name("nn_adam.npz"))
NAMES = sorted(key.removeprefix("p0/") for key in DATA.files if key.startswith("p0/"))
CASES = sorted({key.split("/")[0] for key in DATA.files if "/theta/" in key})
LOUD = {"output_scale": 0.05, "initial_learning_rate": 1e-2, "decay_strength": 0.1}


def array(key):
    return torch.from_numpy(np.asarray(DATA[key]))


def theta(case, dtype=torch.float32):
    prefix = f"{case}/theta/"
    found = {k.removeprefix(prefix): DATA[k] for k in DATA.files if k.startswith(prefix)}
    return trees.cast(pretrained.from_google("nn_adam", found), dtype)


def run(case, build=lambda named: named, dtype=torch.float32):
    """``(trajectory by name, last hidden state)``; ``build`` makes the tree of tensors by name."""
    rule, th = nn_adam(**({} if case == "init" else LOUD)), theta(case, dtype)
    order = [NAMES[i] for i in trees.leaves(build({k: i for i, k in enumerate(NAMES)}))]
    params = build({name: array(f"p0/{name}").to(dtype) for name in NAMES})
    hidden, rows = rule.init_hidden(th, params), []
    for t in range(20):
        grads = build({name: array(f"grad/{name}")[t].to(dtype) for name in NAMES})
        params, hidden = rule.step(th, params, grads, hidden)
        rows.append(dict(zip(order, trees.leaves(params), strict=True)))
    return trees.stack(rows), hidden


def check_trajectory(case, got):
    """3e-5 of a tensor's largest displacement, after forgiving 8 ulp of the parameter itself."""
    limit = 1e-3 if case == "init" else 3e-5
    for name in NAMES:
        want = array(f"{case}/params/{name}")
        spare = torch.as_tensor(8 * np.spacing(np.abs(want.numpy())))
        moved = (want - array(f"p0/{name}")).abs().max()
        assert ((got[name] - want).abs() - spare).max() <= limit * moved, name


def check_near(got, want, what):
    assert (got - want).abs().max() <= 3e-5 * want.abs().max(), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case, dtype):
    check_trajectory(case, run(case, dtype=dtype)[0])


@pytest.mark.parametrize("case", CASES)
def test_the_last_states_are_the_references(case):
    hidden = run(case)[1]
    numbers = {k: k for k in ("lr", "beta1", "beta2", "epsilon")}
    for name, state in hidden.leaves.items():
        for ours, theirs in {"m": "m", "v": "rms", **numbers}.items():
            check_near(state[ours], array(f"{case}/{theirs}_final/{name}"), (theirs, name))
    for part in "hc":
        rows = torch.stack([hidden.leaves[name]["tensor"][part] for name in NAMES])
        check_near(rows, array(f"{case}/lstm_{part}_final"), part)


def test_the_order_of_the_tensors_does_not_matter():
    for build in (lambda n: list(n.values()), lambda n: list(reversed(n.values()))):
        check_trajectory("pert", run("pert", build)[0])


@pytest.mark.parametrize("case", [c for c in CASES if c == "init"])
def test_a_fresh_rule_starts_as_the_reference(case):
    fresh, want = nn_adam().init(), theta(case)
    assert trees.paths(fresh) == trees.paths(want)
    for path, a, b in zip(trees.paths(want), trees.leaves(fresh), trees.leaves(want), strict=True):
        assert a.shape == b.shape, path
        if path == "rnn/lstm_w":
            assert a.std() == pytest.approx(float(b.std()), rel=0.1)
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=0, msg=path)
