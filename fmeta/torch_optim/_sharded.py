"""Updates of parameters that are spread over processes (DTensor, as FSDP2 makes them).

A rule sees whole tensors: what is sharded is gathered, the functional update runs on every process
with the same numbers, and each keeps its own shard of the result. So the trajectory is that of one
process, whatever the rule looks at. A rule that treats every leaf by itself gets a few leaves at a
time, so that no more than those are ever whole on one process; another one gets all of them.

Hidden tensors that begin with the axes of their parameter are sharded as it is; what is smaller
(counts, factored moments, ``shared``) is kept whole on every process, as a plain tensor. Both are
what `torch.distributed.checkpoint` saves and, on another number of processes, loads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import is_leafwise
from fmeta.optimizer import Hidden, Optimizer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "everywhere",
    "full",
    "init_hidden",
    "is_dtensor",
    "is_sharded",
    "local",
    "mean_loss",
    "shard_like",
    "update",
]

Tree = Any

# Elements of the leaves that are gathered at once: large enough for one all-gather not to be all
# waiting, small beside the memory of what shards its model (64 MiB in float32).
_AT_ONCE = 2**24


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a DTensor; imports nothing (without the import there can be none)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_sharded(tree: Tree) -> bool:
    """Whether any leaf of the tree is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(x, module.DTensor) for x in trees.leaves(tree))


def full(x: Any) -> Any:
    """A DTensor gathered from all processes (all of them must call this); else ``x`` itself."""
    return x.full_tensor() if is_dtensor(x) else x


def local(x: Any) -> Any:
    """This process's part of a DTensor, the same memory; else ``x`` itself."""
    return x.to_local() if is_dtensor(x) else x


def shard_like(x: Any, like: Any) -> Any:
    """This process's shard of ``x`` as a DTensor placed as ``like``, or ``x`` itself.

    Args:
        x: a whole tensor, the same on all processes.
        like: the parameter it belongs to. ``x`` is sharded where its shape begins with that of
            ``like``, and ``like`` is a DTensor.
    """
    if not is_dtensor(like) or not isinstance(x, Tensor) or x.shape[: like.ndim] != like.shape:
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh
    x = x.contiguous()
    whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    own = whole.redistribute(placements=like.placements).to_local()
    if own.untyped_storage().nbytes() > own.numel() * own.element_size():
        own = own.clone()  # a view would keep the whole tensor in memory
    return DTensor.from_local(
        own, mesh, like.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def mean_loss(loss: Tensor | None, params: Tree) -> Tensor | None:
    """The loss averaged over the processes that share the parameters.

    Each process has the loss of its own part of the batch. A rule that reads it must read the same
    number everywhere, or the shards would drift apart.
    """
    meshes = _meshes(params)
    if loss is None or not meshes:
        return loss
    return full(loss) if is_dtensor(loss) else _reduced(loss, meshes[0], "sum") / meshes[0].size()


def everywhere(flag: Tensor, params: Tree) -> Tensor:
    """Whether ``flag`` (a boolean scalar) is set on all processes that share the parameters."""
    for mesh in _meshes(params):
        flag = _reduced(flag.to(torch.float32), mesh, "min") > 0
    return flag


def _meshes(params: Tree) -> list[Any]:
    """The device meshes of the parameters, each once, in order."""
    return list(dict.fromkeys(x.device_mesh for x in trees.leaves(params) if is_dtensor(x)))


def _reduced(x: Tensor, mesh: Any, how: str) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial

    parts = [Partial(how)] * mesh.ndim
    return DTensor.from_local(x.detach(), mesh, parts, run_check=False).full_tensor()


def init_hidden(
    optimizer: Optimizer, opt_params: Tree, model_params: Tree, *, num_steps: Any = None
) -> Any:
    """`Optimizer.init_hidden` for trees with DTensor leaves, with the hidden state sharded.

    Raises:
        TypeError: when the hidden state is no `Hidden`.
    """
    flat, spec = trees.flatten(model_params)
    states: list[Any] = [{}] * len(flat)
    shared: dict[str, Any] = {}
    for run in _runs(optimizer, flat, range(len(flat))):
        whole = [full(p) if i in run else None for i, p in enumerate(flat)]
        hidden = optimizer.init_hidden(
            opt_params, trees.unflatten(spec, whole), num_steps=num_steps
        )
        shared = _split(hidden).shared
        found = trees.flatten_up_to(spec, hidden.leaves, model_params, "the hidden state")
        for i in run:
            states[i] = _shard(found[i], flat[i])
    return Hidden(trees.unflatten(spec, states), shared)


def update(
    optimizer: Optimizer,
    opt_params: Tree,
    model_params: Tree,
    grads: Tree,
    hidden: Any,
    *,
    loss: Tensor | None = None,
    extras: Mapping[str, Any] | None = None,
) -> tuple[Tree, Hidden]:
    """`Optimizer.update` for trees with DTensor leaves; every process must call it.

    Args:
        model_params, grads, hidden: as in `Optimizer.update`; any tensor of them may be a DTensor.
        loss: the same on all processes (`mean_loss`).

    Returns:
        ``(delta, hidden)``, both placed as the parameters.

    Raises:
        TypeError: when the hidden state is no `Hidden`.
    """
    flat, spec = trees.flatten(model_params)
    slopes = trees.match(model_params, grads, "the gradient")
    states = trees.flatten_up_to(spec, _split(hidden).leaves, model_params, "the hidden state")
    active = [i for i, g in enumerate(slopes) if g is not None]
    shared = trees.map(full, hidden.shared)
    delta: list[Any] = [None] * len(flat)
    new = list(states)
    for run in _runs(optimizer, flat, active):
        here = set(run)
        alone = len(here) < len(active)
        changes, after = optimizer.update(
            opt_params,
            trees.unflatten(
                spec,
                [_stand_in(p) if alone and i not in here else full(p) for i, p in enumerate(flat)],
            ),
            trees.unflatten(spec, [full(g) if i in here else None for i, g in enumerate(slopes)]),
            Hidden(
                trees.unflatten(
                    spec,
                    [trees.map(full if i in here else _stand_in, s) for i, s in enumerate(states)],
                ),
                shared,
            ),
            loss=loss,
            extras=extras,
        )
        changes = trees.flatten_up_to(spec, changes, model_params, "the optimizer's delta")
        found = trees.flatten_up_to(spec, after.leaves, model_params, "the hidden state")
        for i in run:
            delta[i] = shard_like(changes[i], flat[i])
            new[i] = _shard(found[i], flat[i])
        shared = after.shared
    return trees.unflatten(spec, delta), Hidden(trees.unflatten(spec, new), shared)


def _runs(optimizer: Optimizer, flat: list[Any], active: Any) -> Iterator[list[int]]:
    """The leaves that are worked on together, in order."""
    if not is_leafwise(optimizer):
        yield list(active)
        return
    run: list[int] = []
    size = 0
    for i in active:
        numel = 0 if flat[i] is None else flat[i].numel()
        if run and size + numel > _AT_ONCE:
            yield run
            run, size = [], 0
        run.append(i)
        size += numel
    yield run


def _stand_in(param: Any) -> Any:
    """A tensor of the same shape without memory, for a leaf whose update is not asked for."""
    return local(param).new_zeros(()).expand(param.shape) if is_dtensor(param) else param


def _shard(state: dict[str, Any], param: DTensor) -> dict[str, Any]:
    return trees.map(lambda x: shard_like(x, param), state)


def _split(hidden: Any) -> Hidden:
    if isinstance(hidden, Hidden):
        return hidden
    raise TypeError(
        f"the hidden state is a {type(hidden).__name__}, which cannot be split by parameter, so it "
        "cannot be sharded: let `init_hidden` return fmeta.optimizer.Hidden(leaves, shared)"
    )
