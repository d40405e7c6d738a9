"""`adafactor_mlp` equals the trajectories of google/learned_optimization (float32)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fmeta import optimizers, trees

from .trajectory import copies, errors, first, run, sub, tensors

DATA = np.load(Path(__file__).with_name("adafac_mlp_lopt.npz"))
TENTHS = {"exp_mult": 0.1, "step_mult": 0.1}
CASES = {
    "init": {},
    "pert": TENTHS,
    "var": {
        "hidden_size": 8,
        "hidden_layers": 1,
        "initial_momentum_decays": (0.9, 0.95),
        "initial_rms_decays": (0.9, 0.99),
        "initial_adafactor_decays": (0.8, 0.99),
        **TENTHS,
    },
}


def trained(case, dtype=torch.float32, **more):
    rule = optimizers.adafactor_mlp(**CASES[case], **more)
    th = tensors(sub(DATA, f"{case}/theta/"))
    like = {k: x.shape for k, x in rule.init().items()}
    assert like == {k: x.shape for k, x in th.items()}
    start, grads = (trees.cast(tensors(sub(DATA, k)), dtype) for k in ("p0/", "grad/"))
    return start, *run(rule, th, start, grads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "more", [{}, {"dtype": torch.float64}, {"chunk_size": 5}, {"chunk_size": 16}], ids=str
)
def test_parameters_of_20_steps(case, more):
    start, path, _ = trained(case, **more)
    wanted = tensors(sub(DATA, f"{case}/params/"))
    assert len(wanted) == 7
    for name, error in errors(start, wanted, path).items():
        assert error < (1e-3 if case == "init" else 3e-5), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_many_leaves_of_each_shape_go_as_one(case, chunk_size):
    """The lift stacks them; all but the first of each shape are scaled."""
    rule = optimizers.adafactor_mlp(**CASES[case], chunk_size=chunk_size)
    th, start, grads = (tensors(sub(DATA, k)) for k in (f"{case}/theta/", "p0/", "grad/"))
    path, _ = run(rule, th, copies(start, 5), copies(grads, 5))
    wanted = tensors(sub(DATA, f"{case}/params/"))
    for name, error in errors(start, wanted, first(path)).items():
        assert error < (1e-3 if case == "init" else 3e-5), name


@pytest.mark.parametrize("case", CASES)
def test_state_after_20_steps(case):
    _, _, hidden = trained(case)
    keys = {"m": "m", "rms": "rms", "v_row": "row", "v_col": "col", "v_diag": "v"}
    compared = 0
    for theirs, ours in keys.items():
        for name, want in tensors(sub(DATA, f"{case}/{theirs}/")).items():
            state = hidden.leaves[name]
            if theirs in ("m", "rms"):
                got = torch.stack([state[f"{ours}{i}"] for i in range(want.shape[-1])], -1)
            else:
                got = state[ours]
            torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-6 * float(want.abs().max()))
            compared += 1
    assert compared == 26
    assert all(int(state["count"]) == 20 for state in hidden.leaves.values())
