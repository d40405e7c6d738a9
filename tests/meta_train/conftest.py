"""A meta-problem of a microsecond: half the square of noisy w; its tasks can be made to diverge."""

import math

import pytest
import torch

from fmeta.estimators import Estimate, Estimator
from fmeta.random import fold_in


@pytest.fixture(scope="session")
def noisy():
    """Builder of estimators.

    ``noisy(at, num_tasks)``: ``at[k]`` maps the tasks that diverge in outer step k to their inner
    steps; where all do, the estimate is not finite.
    """

    def build(at=None, num_tasks=4, before=lambda step: None):
        def estimate(meta_params, state):
            step = state["step"]
            before(step)
            out = (at or {}).get(step, {})
            flags = torch.tensor([i in out for i in range(num_tasks)])
            where = torch.tensor([out.get(i, -1) for i in range(num_tasks)])
            bad = math.nan if flags.all() else 0.0
            noise = 0.01 * torch.randn((), generator=fold_in(state["seed"], step)) + bad
            grads = {k: w + noise for k, w in meta_params.items()}
            loss = sum(g.square().sum() for g in grads.values()) / 2
            metrics = {"diverged": flags, "diverged_at": where}
            metrics["signal_to_noise"] = torch.tensor(2.0)
            position = {**state, "step": step + 1, "total": state["total"] + loss.nan_to_num()}
            return Estimate(loss, grads, metrics), position

        def init(meta_params, seed):
            return {"seed": seed, "step": 0, "total": torch.zeros(())}

        return Estimator(init, estimate)

    return build
