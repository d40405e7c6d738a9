"""An estimate has no derivative in reverse mode, and says so where one is asked for."""

import pytest
import torch

import fmeta
from fmeta import estimators, trees
from fmeta.tasks import quadratic

RULE = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.1)
BUILD = {
    "full": lambda f: estimators.full(RULE, f, num_tasks=2, horizon=3),
    "forward": lambda f: estimators.forward(RULE, f, num_tasks=2, horizon=3),
    "truncated": lambda f: estimators.truncated(RULE, f, num_tasks=2, horizon=4, truncation=2),
    "pes": lambda f: estimators.pes(RULE, f, num_tasks=2, horizon=4, truncation=2),
}


@pytest.mark.parametrize("name", BUILD)
def test_reverse_mode_is_refused(name):
    estimator = BUILD[name](quadratic())
    meta_params = RULE.init()
    state = estimator.init(meta_params, 0)

    def loss(meta_params):
        return estimator.estimate(meta_params, state)[0].loss

    with pytest.raises(ValueError, match="at path lr, would be 0: an estimate is a constant"):
        torch.func.grad(loss)(meta_params)
    with pytest.raises(ValueError, match="detach the meta-parameters where a constant is meant"):
        torch.func.vjp(lambda m: loss(trees.map(lambda x: 2 * x, m)), meta_params)
    # Around what is a constant any transform may stand.
    slope = torch.func.grad(lambda x: x * loss(meta_params))(torch.tensor(2.0))
    torch.testing.assert_close(slope, loss(meta_params))


def test_forward_mode_goes_through_the_loss():
    estimator = BUILD["full"](quadratic())
    meta_params = RULE.init()
    state = estimator.init(meta_params, 0)

    def loss(meta_params):
        return estimator.estimate(meta_params, state)[0].loss

    way = {"lr": torch.ones(())}
    _, slope = torch.func.jvp(loss, (meta_params,), (way,))
    torch.testing.assert_close(slope, estimator.estimate(meta_params, state)[0].grads["lr"])
