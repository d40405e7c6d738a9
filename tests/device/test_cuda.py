"""The whole law suite on every GPU device there is; without one, nothing of it has been run."""

import pytest
import torch

from fmeta import learn, optimizers
from fmeta.testing import activations_beside, check_optimizer

DEVICES = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
AXES = {"adafactor_mlp", "normalized_mlp", "basis_mlp", "muon", "velo", "hebbian_mlp"}
OF_A_TREE = {"per_parameter_sgd", "meta_curvature"}
RULES = {
    **{n: builder if n in OF_A_TREE else builder() for n, builder in optimizers.BUILDERS.items()},
    "learned adam": learn(optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=1e-2),
}
CASES = [(name, device) for device in DEVICES for name in RULES]


def test_whether_a_gpu_was_there():
    if not DEVICES:
        pytest.skip("not run on a GPU")
    assert torch.zeros(1, device=DEVICES[0]).device.type == "cuda"


if CASES:

    @pytest.mark.parametrize(("name", "device"), CASES)
    def test_every_law(name, device):
        needs = getattr(RULES[name], "needs", ())
        check_optimizer(
            RULES[name],
            equivariance="axes" if name in AXES else "coordinate",
            device=device,
            extras=activations_beside if "activations" in needs else None,
        )
