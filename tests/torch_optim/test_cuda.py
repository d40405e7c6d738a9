"""The adapter on a GPU; without one, nothing of it has been run."""

import copy

import pytest
import torch

from fmeta.torch_optim import LearnedOptimizer

RULES = ("adam", "muon", "lstm", "normalized_mlp", "basis_mlp", "velo")


def test_whether_a_gpu_was_there():
    if not torch.cuda.is_available():
        pytest.skip("not run on a GPU")
    assert torch.zeros(1, device="cuda").device.type == "cuda"


if torch.cuda.is_available():

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
