"""`mlp` equals the trajectories of google/learned_optimization (float32)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fmeta import optimizers, trees

from .trajectory import copies, errors, first, run, sub, tensors

DATA = np.load(Path(__file__).with_name("mlp_lopt.npz"))
CASES = {"init": {}, "pert": {"exp_mult": 0.1, "step_mult": 0.1}}


def trained(case, dtype=torch.float32, **more):
    rule = optimizers.mlp(**CASES[case], **more)
    th = tensors(sub(DATA, f"{case}/theta/"))
    assert {k: x.shape for k, x in rule.init().items()} == {k: x.shape for k, x in th.items()}
    start, grads = (trees.cast(tensors(sub(DATA, k)), dtype) for k in ("p0/", "grad/"))
    return start, *run(rule, th, start, grads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "more", [{}, {"dtype": torch.float64}, {"chunk_size": 5}, {"chunk_size": 16}], ids=str
)
def test_parameters_of_20_steps(case, more):
    start, path, _ = trained(case, **more)
    wanted = tensors(sub(DATA, f"{case}/params/"))
    assert len(wanted) == 4
    for name, error in errors(start, wanted, path).items():
        assert error < (1e-3 if case == "init" else 3e-5), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_many_leaves_of_each_shape_go_as_one(case, chunk_size):
    """The lift stacks them; all but the first of each shape are scaled."""
    rule = optimizers.mlp(**CASES[case], chunk_size=chunk_size)
    th, start, grads = (tensors(sub(DATA, k)) for k in (f"{case}/theta/", "p0/", "grad/"))
    path, _ = run(rule, th, copies(start, 5), copies(grads, 5))
    wanted = tensors(sub(DATA, f"{case}/params/"))
    for name, error in errors(start, wanted, first(path)).items():
        assert error < (1e-3 if case == "init" else 3e-5), name


@pytest.mark.parametrize("case", CASES)
def test_state_after_20_steps(case):
    _, _, hidden = trained(case)
    for name, want in tensors(sub(DATA, f"{case}/m_final/")).items():
        got = torch.stack([hidden.leaves[name][f"m{i}"] for i in range(6)], -1)
        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-6 * float(want.abs().max()))
