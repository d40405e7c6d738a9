"""Small trainings that give the same numbers in one process and in several.

The functions of a ``folder`` run on every rank (`conftest.in_processes`); those that take a rule run
in the test's own process too, where there is one rank.
"""

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

import fmeta
from fmeta.torch_optim import LearnedOptimizer

STEPS, BATCH, TOKENS, WIDTH = 6, 8, 3, 4

# Rules that look at a coordinate, a matrix, a matrix and its neighbours, the whole tree.
RULES = {
    "adam": lambda: fmeta.optimizers.adam(lr=0.01),
    "normalized_mlp": lambda: fmeta.optimizers.normalized_mlp(lr=0.01),
    "basis_mlp": lambda: fmeta.optimizers.basis_mlp(),
    "lstm": lambda: fmeta.optimizers.lstm(hidden_size=3, num_layers=1),
    "muon": lambda: fmeta.optimizers.muon(lr=0.01),
    "clipped": lambda: fmeta.combinators.chain(
        fmeta.combinators.clip_by_global_norm(0.1), fmeta.optimizers.adam(lr=0.01)
    ),
}


class Block(nn.Module):
    """A transformer block whose axes (7, 4, 1) do not divide evenly among processes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT / WIDTH**0.5, -1) @ v
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(WIDTH, 1)  # one row: the second process gets none of it

    def forward(self, x):
        return 2 * self.head(self.block(x))  # FSDP2 warns of outputs that are views


def net():
    model = Net().double()
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


def train(model, opt, first=0, last=STEPS, clip=None):
    """Steps ``first`` to ``last``, each rank on its own part of the batch."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    norms = []
    for x, y in batches()[first:last]:
        x, y = (z.chunk(size)[rank] for z in (x, y))
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        if clip is not None:
            norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        opt.step()
    return norms


def whole(x):
    """A tensor without its sharding, detached from what made it."""
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.detach().clone()


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def ddp(folder):
    """Weights after training under DDP, for each rule."""
    found = {}
    for rule in RULES:
        model = nn.parallel.DistributedDataParallel(net())
        train(model, optimizer(model.parameters(), rule))
        found[rule] = weights(model.module)
    return found


def fsdp(folder):
    """Under FSDP2, for each rule: weights after all steps, and what checkpoints lead to.

    ``folder`` holds checkpoints of one process after half of the steps, in ``one``; those of the
    two processes go to ``two`` (sharded) and ``whole`` (one file).
    """
    return {rule: fsdp_of(rule, folder) for rule in RULES}


def fsdp_of(rule, folder):
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


def clipped_fsdp(folder):
    """Weights and norms under FSDP2 with torch's own clipping."""
    model = shard(net())
    opt = optimizer(model.parameters(), "adam")
    norms = train(model, opt, clip=0.1)
    return weights(model), norms


def shard(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


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
    dcp.save(state, checkpoint_id=str(path), no_dist=not dist.is_initialized())


def load(model, opt, path):
    state = dict(zip(("model", "optim"), get_state_dict(model, opt), strict=True))
    dcp.load(state, checkpoint_id=str(path), no_dist=not dist.is_initialized())
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optim"])
