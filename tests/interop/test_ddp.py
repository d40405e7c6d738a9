"""Distributed data parallel: half of the batch on each of two processes."""

import pytest
import torch
from torch.testing import assert_close

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.parametrize(
    "rule", ["sgd", "adam", "normalized_mlp", "basis_mlp", "lstm", "muon", "clipped"]
)
def test_two_processes_train_as_one_does(rule, parallel, found):
    model = parallel.net()
    parallel.train(model, parallel.optimizer(model.parameters(), rule))
    want, start = parallel.weights(model), parallel.weights(parallel.net())
    assert all((want[name] != start[name]).any() for name in want)
    for result in found:
        assert_close(result["ddp"][rule], want, rtol=1e-10, atol=1e-10)
    for name in want:  # the processes agree to the last bit
        assert torch.equal(found[0]["ddp"][rule][name], found[1]["ddp"][rule][name])


def test_a_rule_reads_the_mean_loss(parallel, found):
    want = parallel.variant("by_loss")["weights"]
    for result in found:
        assert_close(result["ddp"]["by_loss"], want, rtol=1e-10, atol=1e-10)
