"""Small trainings that give the same numbers in one process and in several.

`everything` runs on every rank; what trains runs in the test's own process too, where there is one.
"""

import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fmeta
from fmeta.torch_optim import LearnedOptimizer, _sharded

STEPS, BATCH, TOKENS, WIDTH = 6, 8, 3, 4

# Rules that look at a coordinate, a matrix, a matrix and its neighbours, the whole tree.
RULES = {
    "sgd": lambda: fmeta.optimizers.sgd(lr=0.05),
    "adam": lambda: fmeta.optimizers.adam(lr=0.01),
    "normalized_mlp": lambda: fmeta.optimizers.normalized_mlp(lr=0.01),
    "basis_mlp": lambda: fmeta.optimizers.basis_mlp(),
    "lstm": lambda: fmeta.optimizers.lstm(hidden_size=3, num_layers=1),
    "muon": lambda: fmeta.optimizers.muon(lr=0.01),
    "clipped": lambda: fmeta.combinators.chain(
        fmeta.combinators.clip_by_global_norm(0.1), fmeta.optimizers.adam(lr=0.01)
    ),
}
# torch broadcasts no state that is empty, be it of its own SGD.
SHARDED = [rule for rule in RULES if rule != "sgd"]


class Block(nn.Module):
    """A transformer block whose axes (7, 4, 1) do not divide evenly among processes."""

    def __init__(self, inner):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, inner)
        self.down = nn.Linear(inner, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT / WIDTH**0.5, -1) @ v
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.block = Block(inner)
        self.head = nn.Linear(WIDTH, 1)  # one row: the second process gets none of it

    def forward(self, x):
        return 2 * self.head(self.block(x))  # FSDP2 warns of outputs that are views


def net(inner=7):
    model = Net(inner).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def batches():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS, BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return list(zip(x, x.square().sum(-1, keepdim=True).sin(), strict=True))


def optimizer(params, rule):
    num_steps = STEPS if rule == "basis_mlp" else None
    return LearnedOptimizer(params, RULES[rule](), lr=0.5, num_steps=num_steps)


def train(model, opt, first=0, last=STEPS, before_step=None, part=None):
    """Steps ``first`` to ``last``, each rank on its own part of the batch.

    ``before_step(model, t, loss)`` runs between gradient and step, and gives arguments for it.
    """
    if part is None:
        part = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rank, size = part
    for t, (x, y) in list(enumerate(batches()))[first:last]:
        x, y = (z.chunk(size)[rank] for z in (x, y))
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step(**(before_step(model, t, loss) or {} if before_step else {}))


def whole(x):
    """A tensor without its sharding, detached from what made it."""
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.detach().clone()


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def one_process(folder):
    """Checkpoints of one process after half of the steps, for two to go on from."""
    for rule in SHARDED:
        model = net()
        opt = optimizer(model.parameters(), rule)
        train(model, opt, 0, STEPS // 2)
        save(model, opt, folder / "one" / rule)


def everything(folder):
    """What one of several processes finds under DDP and FSDP2, by rule and by variant."""
    return {
        "ddp": {rule: ddp_of(rule) for rule in [*RULES, "by_loss"]},
        "fsdp": {rule: fsdp_of(rule, folder) for rule in SHARDED},
        "variants": {name: variant(name, shard) for name in VARIANTS},
    }


def meshes(folder):
    """By rule, on four processes: weights with replicas of shards, and with tensor parallelism."""
    found = {"replicas": {}, "tensor parallel": {}}
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for rule in RULES:
        model = shard(net(), mesh=replicas)
        train(model, optimizer(model.parameters(), rule))
        found["replicas"][rule] = weights(model)
        model = net(inner=8)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model.block, both["tensor"], plan)
        model = shard(model, mesh=both["data"])
        train(model, optimizer(model.parameters(), rule), part=(dist.get_rank() // 2, 2))
        found["tensor parallel"][rule] = weights(model)
    return found


def ddp_of(rule):
    """Weights after a training under DDP."""
    model = nn.parallel.DistributedDataParallel(net())
    if rule == "by_loss":
        opt, before_step = by_loss(model)
    else:
        opt, before_step = optimizer(model.parameters(), rule), None
    train(model, opt, before_step=before_step)
    return weights(model.module)


def fsdp_of(rule, folder):
    """Under FSDP2: weights after all steps, and what checkpoints lead to.

    ``folder`` holds those of `one_process` in ``one``; those of the two processes go to ``two``
    (sharded) and ``whole`` (one file).
    """
    half = STEPS // 2
    model = shard(net())
    opt = optimizer(model.parameters(), rule)
    train(model, opt, 0, half)
    save(model, opt, folder / "two" / rule)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    everything = get_state_dict(model, opt, options=full)
    if dist.get_rank() == 0:
        torch.save(everything, folder / f"whole-{rule}.pt")
    train(model, opt, half)
    kept = {
        str(i): {name: list(x.to_local().shape) for name, x in opt.state[p].items() if sharded(x)}
        for i, p in enumerate(model.parameters())
    }
    found = {"straight": weights(model), "kept": kept}

    model, opt = others(rule)
    load(model, opt, folder / "one" / rule)
    train(model, opt, half)
    found["from one process"] = weights(model)

    model, opt = others(rule)
    dist.barrier()
    at_rank0 = torch.load(folder / f"whole-{rule}.pt", weights_only=True)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, at_rank0[0], options=full)
    set_optimizer_state_dict(model, opt, at_rank0[1] if dist.get_rank() == 0 else {}, options=full)
    train(model, opt, half)
    found["from one file"] = weights(model)
    return found


class ByLoss:
    """The step is the longer the higher the loss."""

    needs = frozenset({"loss"})
    init = staticmethod(lambda generator: {})
    init_hidden = staticmethod(lambda th, p: {"count": torch.zeros((), dtype=torch.int64)})

    @staticmethod
    def update(th, p, g, h, loss, extras):
        return -0.1 * loss / (1 + loss) * g, {"count": h["count"] + 1}


def by_loss(model):
    return LearnedOptimizer(model.parameters(), fmeta.tensorwise(ByLoss)), lambda model, t, loss: {
        "loss": mean(loss) if isinstance(model, nn.parallel.DistributedDataParallel) else loss
    }


def mean(loss):
    """Over the processes, as DDP and FSDP do with gradients."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def clip_by_torch(model):
    def before_step(model, t, loss):
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        assert norm > 0.1, norm

    return optimizer(model.parameters(), "adam"), before_step


def broken(model):
    """One infinite number in the gradient of the third step, on one process."""

    def before_step(model, t, loss):
        if t == 2:
            grad = model.block.up.weight.grad
            if sharded(grad):
                grad = grad.to_local()[: 1 - dist.get_rank()]
            grad[:1, 0] = float("inf")

    rule = fmeta.optimizers.adam(lr=0.01)
    opt = LearnedOptimizer(model.parameters(), rule, lr=0.5, nonfinite="skip")
    return opt, before_step


def grouped(model):
    """Groups with options of their own, a learning rate that is a tensor, a rate a leaf."""
    rates = {n: 0.01 * (i + 1) for i, (n, _) in enumerate(model.named_parameters())}
    groups = [
        {"params": list(model.block.named_parameters("block")), "weight_decay": 0.1},
        {
            "params": list(model.head.named_parameters("head")),
            "lr": torch.tensor(0.3),
            "maximize": True,
        },
    ]
    return LearnedOptimizer(groups, fmeta.optimizers.adam(lr=rates), lr=0.5), None


def few_at_once(model):
    """As `grouped`, with no room for two large leaves at a time."""
    _sharded._AT_ONCE = 10
    return grouped(model)


def partly_sharded(model):
    """As `grouped`, with a last layer that every process has as a whole."""
    opt, _ = grouped(model)

    def before_step(model, t, loss):
        for p in model.head.parameters():
            if dist.is_initialized():  # this is DDP's part
                p.grad = mean(p.grad)

    return opt, before_step


def averaged(model):
    """With other parameters to evaluate with, few at a time."""
    _sharded._AT_ONCE = 10
    combinators, rule = fmeta.combinators, fmeta.optimizers.adam(lr=0.01)
    rule = combinators.averaged(combinators.averaged(rule, 0.9), "uniform")
    return LearnedOptimizer(model.parameters(), rule, lr=0.5), None


VARIANTS = {
    f.__name__: f
    for f in (by_loss, clip_by_torch, broken, grouped, few_at_once, partly_sharded, averaged)
}


def variant(name, shard=lambda model, whole: model):
    """Weights after a training of that kind, for training and for evaluation."""
    before = _sharded._AT_ONCE
    model = shard(net(), name != "partly_sharded")
    opt, before_step = VARIANTS[name](model)
    train(model, opt, before_step=before_step)
    _sharded._AT_ONCE = before
    with opt.eval_params():
        shown = weights(model)
    return {"weights": weights(model), "shown": shown, "skipped": int(opt.skipped_steps)}


def shard(model, whole=True, mesh=None):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    fully_shard(model.block, mesh=mesh)
    return fully_shard(model, mesh=mesh) if whole else model


def sharded(x):
    return isinstance(x, DTensor)


def others(rule):
    """A sharded model with other weights, and its optimizer, to load into."""
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1)
    model = shard(model)
    return model, optimizer(model.parameters(), rule)


def save(model, opt, path):
    state = dict(zip(("model", "optim"), get_state_dict(model, opt), strict=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process
        dcp.save(state, checkpoint_id=str(path))


def load(model, opt, path):
    state = dict(zip(("model", "optim"), get_state_dict(model, opt), strict=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, checkpoint_id=str(path))
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optim"])
