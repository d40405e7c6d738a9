"""FSDP2 on two processes, and checkpoints that one process writes and two read, and the reverse."""

import pytest
import torch
from torch.testing import assert_close

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)

RULES = ["adam", "normalized_mlp", "basis_mlp", "lstm", "muon", "clipped"]
WAYS = ["straight", "from one process", "from one file"]


def alone(parallel, rule, **shape):
    model = parallel.net(**shape)
    parallel.train(model, parallel.optimizer(model.parameters(), rule))
    return parallel.weights(model)


@pytest.mark.parametrize("rule", RULES)
def test_two_processes_train_as_one_does(rule, parallel, found):
    want = alone(parallel, rule)
    for result in found:
        for way in WAYS:
            message = f"{way}: {{}}".format
            assert_close(result["fsdp"][rule][way], want, rtol=1e-10, atol=1e-10, msg=message)


def test_hidden_state_is_sharded_as_its_parameter(found):
    # block.qkv.weight (12, 4), block.up.weight (7, 4), head.weight (1, 4): rows on each process
    for rank, rows in enumerate(([6, 4, 1], [6, 3, 0])):
        for rule, names in {"adam": ["m", "v"], "basis_mlp": ["m", "n", "v"]}.items():
            kept = found[rank]["fsdp"][rule]["kept"]
            for index, n in zip(("2", "4", "8"), rows, strict=True):
                assert kept[index] == {name: [n, 4] for name in names}
        assert found[rank]["fsdp"]["lstm"]["kept"]["4"] == {
            "h": [rows[1], 4, 1, 3],
            "c": [rows[1], 4, 1, 3],
        }


@pytest.mark.parametrize("rule", RULES)
def test_one_process_goes_on_where_two_stopped(rule, parallel, found, folder):
    want = alone(parallel, rule)
    for way in ("sharded", "one file"):
        model = parallel.net()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-1)
        opt = parallel.optimizer(model.parameters(), rule)
        if way == "sharded":
            parallel.load(model, opt, folder / "two" / rule)
        else:
            weights, state = torch.load(folder / f"whole-{rule}.pt", weights_only=True)
            parallel.set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
        parallel.train(model, opt, parallel.STEPS // 2)
        assert_close(parallel.weights(model), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    ["by_loss", "clip_by_torch", "broken", "grouped", "few_at_once", "partly_sharded", "averaged"],
)
def test_what_a_loop_does_with_a_sharded_model(name, parallel, found):
    """Losses of parts, clipping by torch, a gradient that is infinite, groups, pieces of a step."""
    want = parallel.variant(name)
    assert want["skipped"] == (name == "broken")
    for result in found:
        assert result["variants"][name]["skipped"] == want["skipped"]
        for what in ("weights", "shown"):
            assert_close(result["variants"][name][what], want[what], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_meshes_of_two_axes(parallel, on_four):
    """Shards that are replicated, and shards of a model that is tensor parallel."""
    for result in on_four("meshes"):
        for rule in parallel.RULES:
            want = alone(parallel, rule)
            assert_close(result["replicas"][rule], want, rtol=1e-10, atol=1e-10)
            want = alone(parallel, rule, inner=8)
            assert_close(result["tensor parallel"][rule], want, rtol=1e-10, atol=1e-10)
