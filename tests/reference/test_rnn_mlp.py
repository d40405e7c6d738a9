"""rnn_mlp equals the trajectories and states of google's RNNMLPLOpt (float32)."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fmeta
from fmeta import pretrained, trees
from fmeta.optimizers import rnn_mlp

DATA = np.load(Path(__file__).with_name("rnn_mlp_lopt.npz"))
NAMES = sorted(key.removeprefix("p0/") for key in DATA.files if key.startswith("p0/"))
CASES = sorted({key.split("/")[0] for key in DATA.files if "/theta/" in key})
LOUD = {"step_multiplier": 0.1, "magnitude_rate": 0.1}


def array(key):
    return torch.from_numpy(np.asarray(DATA[key]))


def theta(case, dtype=torch.float32):
    prefix = f"{case}/theta/"
    found = {k.removeprefix(prefix): DATA[k] for k in DATA.files if k.startswith(prefix)}
    return trees.cast(pretrained.from_google("rnn_mlp", found), dtype)


def flags(case):
    key = f"{case}/is_valid_steps"
    steps = DATA[key].tolist() if key in DATA.files else []
    return torch.tensor([t in steps for t in range(20)])


def rule_of(case, **arguments):
    return rnn_mlp(**({} if case == "init" else LOUD), **arguments)


def start_of(dtype=torch.float32):
    return {name: array(f"p0/{name}").to(dtype) for name in NAMES}


def run(case, build=lambda named: named, dtype=torch.float32, **arguments):
    """``(trajectory by name, last hidden state)``; ``build`` makes the tree of tensors by name."""
    rule, th, valid = rule_of(case, **arguments), theta(case, dtype), flags(case)
    order = [NAMES[i] for i in trees.leaves(build({k: i for i, k in enumerate(NAMES)}))]
    params = build(start_of(dtype))
    hidden, rows = rule.init_hidden(th, params, num_steps=20), []
    for t in range(20):
        grads = build({name: array(f"grad/{name}")[t].to(dtype) for name in NAMES})
        params, hidden = rule.step(
            th, params, grads, hidden, loss=array("loss")[t], extras={"is_valid": valid[t]}
        )
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


def test_a_case_sees_validation_losses():
    assert any(flags(case).any() for case in CASES)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"dtype": torch.float64}, {"chunk_size": 1}, {"chunk_size": 7}],
    ids=["plain", "float64", "chunks of 1", "chunks of 7"],
)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case, arguments):
    check_trajectory(case, run(case, **arguments)[0])


@pytest.mark.parametrize("case", CASES)
def test_the_last_states_are_the_references(case):
    hidden = run(case)[1]
    for name, state in hidden.leaves.items():
        for ours, theirs in {"m": "m", "v": "rms", "from_mlp": "from_mlp"}.items():
            check_near(state[ours], array(f"{case}/{theirs}_final/{name}"), (theirs, name))
    for part in "hc":
        rows = torch.stack([hidden.leaves[name]["tensor"][part] for name in NAMES])
        check_near(rows, array(f"{case}/lstm_{part}_final"), part)
    check_near(hidden.shared["from_rnn"], array(f"{case}/from_lstm_final"), "from_rnn")
    check_near(hidden.shared["clip"], array(f"{case}/clip_value_final"), "clip")
    for kind in ("train", "valid"):
        want = array(f"{case}/{kind}_loss_final")
        got = [hidden.shared[f"{kind}_{k}"].to(want.dtype) for k in ("mean", "var", "count")]
        torch.testing.assert_close(torch.stack(got), want, rtol=1e-5, atol=0)


def test_the_order_of_the_tensors_does_not_matter():
    for build in (lambda n: list(n.values()), lambda n: list(reversed(n.values()))):
        check_trajectory("pert", run("pert", build)[0])


def test_an_unroll_gives_the_same_with_a_flag_a_step():
    """The losses of the file as those of an inner problem whose gradients are those given."""
    case, th = "pert", theta("pert")
    batches = {"loss": array("loss"), "grad": {name: array(f"grad/{name}") for name in NAMES}}

    def loss(params, batch):
        slopes = [(batch["grad"][k] * (p - p.detach())).sum() for k, p in params.items()]
        return batch["loss"] + torch.stack(slopes).sum()

    found = fmeta.unroll(
        rule_of(case), loss, th, start_of(), batches, extras={"is_valid": flags(case)}
    )
    torch.testing.assert_close(found.losses, array("loss"))
    for name in NAMES:
        torch.testing.assert_close(found.params[name], run(case)[0][name][-1])


@pytest.mark.parametrize("case", [c for c in CASES if c == "init"])
def test_a_fresh_rule_is_structured_as_the_references(case):
    fresh, want = rnn_mlp().init(), theta(case)
    shapes = lambda tree: (trees.paths(tree), [x.shape for x in trees.leaves(tree)])
    assert shapes(fresh) == shapes(want)
    for path, a, b in zip(trees.paths(want), trees.leaves(fresh), trees.leaves(want), strict=True):
        if a.numel() > 100:
            assert a.std() == pytest.approx(float(b.std()), rel=0.15), path
