"""What few-shot learners train: a network as pure functions, its statistics apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fmeta import trees
from fmeta._convolutions import fast_convolutions
from fmeta.fewshot._statistics import explicit
from fmeta.functional import functionalize, moved
from fmeta.tasks._networks import Network

__all__ = ["BATCH_NORM", "Model", "as_model", "beside", "check_adapts", "check_batch_norm"]

BATCH_NORM = ("transductive", "support")


class Model(NamedTuple):
    """A network whose normalisation is explicit.

    Attributes:
        init: ``init(generator) -> params``, a flat dict.
        apply: ``apply(params, x, stats=()) -> (outputs, stats)``. Without ``stats`` the network
            normalises by those of ``x``, and returns them; with ``stats`` by these. A network that
            does not normalise returns ``()``.
        is_head: ``is_head(name) -> bool``: which parameters are of its last layer.
        embed: ``embed(params, x, stats=()) -> (features, stats)``, all but the last layer; or
            None where that is not known.
        head: ``head(params, features) -> outputs``, the last layer; None together with ``embed``.
        num_features: numbers in ``features``; None where that is not known.
    """

    init: Callable[[torch.Generator], dict[str, Tensor]]
    apply: Callable[..., tuple[Tensor, Any]]
    is_head: Callable[[str], bool]
    embed: Callable[..., tuple[Tensor, Any]] | None = None
    head: Callable[..., Tensor] | None = None
    num_features: int | None = None


def as_model(network: Any, batch_norm: str = "transductive") -> Model:
    """A `Model` of one, of a module or of a `Network`.

    Args:
        network: a `Model`; an ``nn.Module``, which starts from the parameters it has, whatever the
            generator, and normalises by the statistics of the batch, its running ones put aside,
            and whose frozen parameters (``requires_grad=False``) are constants that are neither
            adapted nor learned; or a network of `fmeta.tasks`.
        batch_norm: with ``"support"`` the statistics of a module are explicit, as those of a
            `Model` are; else torch's own layers work them out, which is faster.

    Raises:
        TypeError: for anything else, a module without parameters that are not frozen included.
        ValueError: an unknown policy.
    """
    check_batch_norm(batch_norm)
    if isinstance(network, Model):
        return network
    if isinstance(network, nn.Module):
        return _of_module(network, batch_norm == "support")
    if isinstance(network, Network):
        init, apply = network.init, network.apply

        def forward(params: Any, x: Tensor, stats: Any = ()) -> tuple[Tensor, Any]:
            return apply(params, x), ()

        return Model(init, forward, _last_of(list(init(torch.Generator().manual_seed(0)))))
    raise TypeError(
        f"a few-shot learner wants an nn.Module, a Model such as fmeta.fewshot.conv4(ways=5), got "
        f"a {type(network).__name__}"
    )


def _of_module(module: nn.Module, explicit_statistics: bool) -> Model:
    moving = {name for name, p in module.named_parameters() if p.requires_grad}
    if not any(True for _ in module.parameters()):
        raise TypeError(f"{type(module).__name__} has no parameters: there is nothing to adapt")
    if not moving:
        raise TypeError(
            f"all parameters of {type(module).__name__} are frozen, so that there is nothing to "
            "adapt: call .requires_grad_() of those that are to move"
        )
    normalises = any(isinstance(m, _BatchNorm) for m in module.modules())
    if explicit_statistics and normalises:
        with_stats, everything, buffers = explicit(module)
    else:
        pure, everything, buffers = functionalize(module, batch_norm="batch")

        def with_stats(params: Any, buffers: Any, x: Tensor, stats: Any) -> tuple[Tensor, Any]:
            return pure(params, buffers, x), ()

    params = {name: p for name, p in everything.items() if name in moving}
    frozen = {name: p for name, p in everything.items() if name not in moving}
    known = next(iter(params))
    # It looks at every call of a function, so that it is for networks that convolve.
    fast = fast_convolutions if any(p.ndim == 4 for p in everything.values()) else nullcontext

    def constants(now: Any) -> dict[str, Tensor]:
        """What is frozen, where and in which dtype the parameters are now."""
        if known not in now:  # the module will say what is missing
            return frozen
        was, dtype = params[known].dtype, now[known].dtype
        there = moved(frozen, now[known].device)
        return {name: p.to(dtype) if p.dtype is was else p for name, p in there.items()}

    def apply(params: Any, x: Tensor, stats: Any = ()) -> tuple[Tensor, Any]:
        if frozen:
            params = {**params, **constants(params)}
        with fast():
            return with_stats(params, buffers, x, stats)

    def init(generator: torch.Generator) -> dict[str, Tensor]:
        return {name: p.clone() for name, p in params.items()}  # to be changed without harm

    return Model(init, apply, _last_of(list(everything)))


def _last_of(names: list[str]) -> Callable[[str], bool]:
    """Whether a name has the prefix of the last one: of its module, or its number."""
    last = names[-1]
    stem, dot, _ = last.rpartition(".")
    if dot:
        return lambda name: name.rpartition(".")[0] == stem
    number = last.lstrip("abcdefghijklmnopqrstuvwxyz_")
    return lambda name: name.lstrip("abcdefghijklmnopqrstuvwxyz_") == number


def beside(params: Any, more: Any, *, dtype: bool = True) -> Any:
    """``more`` on the device, and unless told otherwise in the dtype, of a network's parameters."""
    known = [x for x in trees.leaves(params) if x.is_floating_point()]
    if not known:
        return more
    like: dict[str, Any] = {"device": known[0].device}
    if dtype:
        like["dtype"] = known[0].dtype
    return trees.map(lambda x: x.to(**like), more)


def check_adapts(adapts: Callable[[str], bool], names: list[str], network: Any) -> None:
    """Raises a ValueError unless a parameter is chosen, which tells of those that are frozen.

    Args:
        adapts: ``adapts(name) -> bool``.
        names: of the parameters that are not frozen.
        network: what they are of.
    """
    if any(map(adapts, names)):
        return
    told = f"adapts chooses none of the parameters {', '.join(names)}"
    everything = network.named_parameters() if isinstance(network, nn.Module) else ()
    frozen = [name for name, _ in everything if name not in names and adapts(name)]
    if frozen:
        told += (
            f", but only {', '.join(frozen)}, frozen and so never adapted: call .requires_grad_() "
            "of those, or choose others"
        )
    raise ValueError(told)


def check_batch_norm(batch_norm: str) -> None:
    """Raises a ValueError unless this is a policy."""
    if batch_norm not in BATCH_NORM:
        raise ValueError(f"batch_norm must be one of {', '.join(BATCH_NORM)}, got {batch_norm!r}")
