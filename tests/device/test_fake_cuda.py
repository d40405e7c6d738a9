"""Steps and forward passes on fake CUDA tensors: device mixes are caught without a GPU.

A CPU build of torch can run plain operations and vmap on them, under ``no_grad`` only: reverse mode
there aborts the process.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fmeta
from fmeta import functionalize, learn, optimizers, trees
from fmeta.optimizers import adam, sgd
from fmeta.testing import activations_beside, built_in_trees

OF_A_TREE = {"per_parameter_sgd", "meta_curvature"}


def warm_up(t, num_steps):
    return (t + 1) / num_steps


def by_rank(path, tensor):
    return "matrix" if tensor.ndim > 1 else "vector"


RULES = {
    **{name: builder for name, builder in optimizers.BUILDERS.items() if name not in OF_A_TREE},
    "per_parameter_sgd": lambda: optimizers.per_parameter_sgd(built_in_trees()["nested"]),
    "meta_curvature": lambda: optimizers.meta_curvature(built_in_trees()["nested"]),
    "momentum": lambda: sgd(momentum=0.9, nesterov=True),
    "rmsprop, centered": lambda: optimizers.rmsprop(momentum=0.5, centered=True),
    "learned adam": lambda: learn(adam, {"lr": "log", "betas": "log1m"}),
    "chain": lambda: fmeta.chain(fmeta.clip_by_global_norm(1.0), adam()),
    "partition": lambda: fmeta.partition({"matrix": adam(), "vector": sgd()}, by_rank),
    "masked": lambda: fmeta.masked(adam(), lambda path, x: x.ndim > 1),
    "scheduled": lambda: fmeta.scheduled(fmeta.with_weight_decay(adam(), 0.01), warm_up),
    "scheduled by fmeta.schedules": lambda: fmeta.scheduled(
        adam(),
        fmeta.schedules.product(
            fmeta.schedules.warmup_cosine(3), fmeta.schedules.piecewise([2], [1.0, 0.5])
        ),
    ),
    "wrappers": lambda: fmeta.averaged(
        fmeta.lookahead(fmeta.apply_if_finite(fmeta.accumulate(adam(), 2), 3), 2)
    ),
    "transforms": lambda: fmeta.chain(fmeta.clip_by_value(0.5), fmeta.orthogonalize(), sgd()),
    "coordinatewise Linear": lambda: fmeta.coordinatewise(nn.Linear(2, 1)),
    "coordinatewise LSTMCell": lambda: fmeta.coordinatewise(nn.LSTMCell(2, 3)),
    "optimizer_from_step": lambda: fmeta.optimizer_from_step(
        lambda g: torch.tensor(0.1),
        lambda th, p: {},
        lambda th, p, g, h: (trees.map(lambda p, g: p - th * g, p, g), h),
    ),
}


def on(device, tree):
    """Fake tensors of the same shapes and dtypes; call it in a fake mode only."""
    return trees.map(lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device), tree)


def contiguous(x):
    return x.clone(memory_format=torch.contiguous_format)


def indexed(x, index):
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        taken = sum(i is not None for i in index) - 1
        index = (*index[:at], *[slice(None)] * (x.ndim - taken), *index[at + 1 :])
    dim = 0
    for i in index:
        if isinstance(i, int):
            x = x.select(dim, i)
            continue
        if i is None:
            x = x.unsqueeze(dim)
        elif isinstance(i, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, i.start, i.stop, i.step or 1)
        else:
            raise NotImplementedError(f"index {i!r}")
        dim += 1
    return x


@contextmanager
def fake():
    """Inside it every new tensor is fake. Build what must be real before."""
    with torch.no_grad(), FakeTensorMode():
        yield


def assert_on_cuda(tree):
    for path, x in zip(trees.paths(tree), trees.leaves(tree), strict=True):
        assert x is None or x.device.type == "cuda", path


REAL = built_in_trees()["nested"]
MIX = r"cpu.*cuda|cuda.*cpu"


def built(name):
    rule = RULES[name]()
    return rule, rule.init()


def extras_of(rule, params):
    return activations_beside(params) if "activations" in rule.needs else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_steps(name, dtype):
    rule, th = built(name)
    with fake():
        th, params = on("cuda", th), trees.cast(on("cuda", REAL), dtype)
        hidden = rule.init_hidden(th, params, num_steps=5)
        assert_on_cuda(hidden)
        p, loss = params, torch.ones((), device="cuda")
        for _ in range(2):
            extras = extras_of(rule, p)
            grads = trees.map(torch.ones_like, p)
            p, hidden = rule.step(th, p, grads, hidden, loss=loss, extras=extras)
            assert_on_cuda((p, hidden))
        assert [x.shape for x in trees.leaves(p)] == [x.shape for x in trees.leaves(REAL)]
        tasks = trees.map(lambda x: torch.stack([x, x]), (p, p, hidden))
        step = lambda p, g, h: rule.step(th, p, g, h, loss=loss, extras=extras_of(rule, p))
        assert_on_cuda(torch.vmap(step)(*tasks))


@pytest.mark.parametrize("name", RULES)
def test_a_mix_of_devices_is_caught(name):
    rule, th = built(name)
    with fake():
        th, params = on("cuda", th), on("cuda", REAL)
        hidden = rule.init_hidden(th, params, num_steps=5)
        given = {"loss": torch.ones((), device="cuda"), "extras": extras_of(rule, params)}
        with pytest.raises((ValueError, RuntimeError), match=MIX):
            rule.step(th, params, on("cpu", params), hidden, **given)
        mixed = {"a": params["conv"], "b": on("cpu", params["conv"])}
        with pytest.raises(ValueError, match="mix devices: a is on cuda:0, b on cpu"):
            rule.init_hidden(th, mixed, num_steps=5)


@pytest.mark.parametrize("name", ["lstm", "normalized_mlp", "coordinatewise Linear"])
def test_opt_params_left_on_the_cpu_are_caught(name):
    rule, th = built(name)
    with fake():
        params = {"w": torch.ones(3, 2, device="cuda")}
        th = trees.map(lambda x: on("cpu", x).expand(x.shape), th)
        hidden = rule.init_hidden(th, params)
        with pytest.raises((ValueError, RuntimeError), match=MIX):
            rule.step(th, params, params, hidden)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.rnn = nn.LSTM(4, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


NETS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (6, 3), (6, 2)),
    "CNN": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64, 3),
        ).eval(),
        (2, 1, 8, 8),
        (2, 3),
    ),
    "LSTM": (Recurrent, None, (2, 3, 5)),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        (2, 3, 8),
        (2, 3, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_forward_passes(name, monkeypatch):
    if name == "transformer layer":
        # torch's own attention uses these two, whose bindings ask for the CUDA library. fmeta's
        # steps and recurrent nets use neither.
        monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
        monkeypatch.setattr(torch.Tensor, "__getitem__", indexed)
    build, shape, out = NETS[name]
    apply, params, buffers = functionalize(build())
    x = torch.zeros(2, 3, dtype=torch.int64) if shape is None else torch.zeros(shape)
    with fake():
        params, buffers, x = on("cuda", (params, buffers, x))
        y = apply(params, buffers, x)
        assert_on_cuda(y)
        assert y.shape == out
        tasks = {k: torch.stack([v, v]) for k, v in params.items()}
        batched = torch.vmap(lambda p: apply(p, buffers, x))(tasks)
        assert_on_cuda(batched)
        assert batched.shape == (2, *out)
        with pytest.raises((ValueError, RuntimeError), match=MIX):
            apply(params, buffers, on("cpu", x))
