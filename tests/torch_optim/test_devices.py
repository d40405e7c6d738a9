"""Steps on devices without values (meta) and, where there is one, on a GPU."""

import copy
import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer

KNOWN = {"loss", "num_steps"}
OF_A_TREE = {  # builders that take the parameter tree first
    n
    for n, b in optimizers.BUILDERS.items()
    if any(p.default is p.empty for p in inspect.signature(b).parameters.values())
}
RULES = [n for n, b in optimizers.BUILDERS.items() if n in OF_A_TREE or b().needs <= KNOWN]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run on a GPU")


def step_on_meta(model, opt):
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    opt.step(loss=torch.empty((), device="meta"))


@pytest.mark.parametrize("nonfinite", ["allow", "skip", "raise"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_on_meta_has_the_state_of_a_step(rule, nonfinite, kit):
    model = kit.net()
    real = LearnedOptimizer(
        model.parameters(), rule, lr=0.5, weight_decay=0.1, num_steps=9, nonfinite=nonfinite
    )
    kit.train(model, real, 0, 2)
    shadow = kit.net().to("meta")
    opt = LearnedOptimizer(
        shadow.parameters(), rule, lr=0.5, weight_decay=0.1, num_steps=9, nonfinite=nonfinite
    )
    for _ in range(2):
        step_on_meta(shadow, opt)
    assert opt.state.keys() == set(shadow.parameters()) or not real.state
    for p, q in zip(model.parameters(), shadow.parameters(), strict=True):
        want, got = real.state.get(p, {}), opt.state.get(q, {})
        assert want.keys() == got.keys()
        for k, x in want.items():
            assert got[k].device.type == "meta", k
            assert (got[k].shape, got[k].dtype) == (x.shape, x.dtype), k


def test_weights_follow_parameters_that_are_replaced_in_their_groups(kit):
    """As some libraries do when they move or shard a model."""
    model, shadow = kit.net(), kit.net().to("meta")
    opt = LearnedOptimizer(model.named_parameters(), "lstm")
    opt.param_groups[0]["params"] = list(shadow.parameters())
    step_on_meta(shadow, opt)
    assert {x.device.type for s in opt.state.values() for x in s.values()} == {"meta"}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("nonfinite", ["allow", "skip"])
@pytest.mark.parametrize("rule", ["adam", "normalized_mlp", "basis_mlp", "lstm"])
def test_no_value_is_looked_at_and_no_device_mixed_on_fake_cuda(rule, nonfinite, capturable):
    optimizer = optimizers.get(rule)()
    th = optimizer.init()
    optimizer = optimizer._replace(init=lambda generator=None: th)  # not every init can be fake
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [
            torch.nn.Parameter(torch.ones(4, 3, device="cuda")),
            torch.nn.Parameter(torch.ones(3, device="cuda", dtype=torch.bfloat16)),
        ]
        opt = LearnedOptimizer(
            params, optimizer, lr=0.5, weight_decay=0.1, num_steps=5, nonfinite=nonfinite,
            capturable=capturable,
        )  # fmt: skip
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step(loss=torch.ones((), device="cuda"))
        assert {x.device.type for s in opt.state.values() for x in s.values()} <= {"cuda"}


@gpu
@pytest.mark.parametrize("rule", RULES)
def test_a_gpu_gives_the_trajectory_of_the_cpu(rule, kit):
    model, other = kit.net(dtype=torch.float64), kit.net(dtype=torch.float64)
    other.to("cuda")
    opt = LearnedOptimizer(model.parameters(), rule, num_steps=9)
    moved = LearnedOptimizer(other.parameters(), rule, num_steps=9)
    for t in range(4):
        for m, o in ((model, opt), (other, moved)):
            o.zero_grad()
            for i, p in enumerate(m.parameters()):
                g = torch.Generator().manual_seed(10 * t + i)
                p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype).to(p.device)
            o.step(loss=torch.tensor(1.0 / (1 + t), dtype=torch.float64))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-6, atol=1e-9)


@gpu
def test_state_saved_on_a_gpu_is_loaded_on_the_cpu_and_back(kit):
    model = kit.net().to("cuda")
    opt = LearnedOptimizer(model.parameters(), "adam")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    other = kit.net()
    moved = LearnedOptimizer(other.parameters(), "adam")
    moved.load_state_dict(kit.through_file(opt.state_dict()))
    assert {x.device.type for s in moved.state.values() for x in s.values()} == {"cpu"}
    opt.load_state_dict(copy.deepcopy(moved.state_dict()))
    assert {x.device.type for s in opt.state.values() for x in s.values()} == {"cuda"}


@gpu
@pytest.mark.parametrize("nonfinite", ["allow", "skip"])
@pytest.mark.parametrize("rule", ["adam", "normalized_mlp", "basis_mlp"])
def test_steps_replayed_from_a_cuda_graph(rule, nonfinite, kit):
    def build():
        model = kit.net().to("cuda")
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        lr = torch.tensor(1.0, device="cuda")
        return model, LearnedOptimizer(
            model.parameters(), rule, lr=lr, num_steps=20, capturable=True, nonfinite=nonfinite
        )

    def gradients(model, t):
        for i, p in enumerate(model.parameters()):
            g = torch.Generator().manual_seed(10 * t + i)
            p.grad.copy_(torch.randn(p.shape, generator=g))

    model, opt = build()
    plain, other = build()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for t in range(3):
            gradients(model, t)
            opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for t in range(3, 7):
        gradients(model, t)
        graph.replay()
    for t in range(7):
        gradients(plain, t)
        other.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@gpu
@pytest.mark.parametrize("nonfinite", ["allow", "skip"])
def test_a_step_does_not_wait_for_the_gpu(nonfinite, kit):
    model = kit.net().to("cuda")
    opt = LearnedOptimizer(model.parameters(), "normalized_mlp", nonfinite=nonfinite)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
