"""What goes into layers and what comes out: of a module, and laid beside its parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from fmeta import trees

__all__ = ["activations", "layer_activity"]

Tensors = dict[str, Tensor]

_PREFIX = "module."


def activations(
    module: nn.Module,
    names: Collection[str] | None = None,
    *,
    types: tuple[type[nn.Module], ...] = (nn.Linear,),
    batch_norm: str | None = None,
) -> Callable[..., dict[str, tuple[Any, Any]]]:
    r"""Inputs and outputs of some submodules, as a pure function of the parameters.

    The function takes what ``apply`` of `fmeta.functionalize` takes, with the same ``params`` and
    ``buffers``, and composes with ``grad``, ``jvp``, ``vmap`` and ``make_fx`` as it does. The
    module is left alone: hooks are on a copy, and only while it runs.

    Args:
        module: any initialised ``nn.Module``.
        names: which submodules, as ``module.named_modules()`` names them; ``""`` is the module
            itself. None: all of ``types``.
        types: which classes of submodules, where no names are given.
        batch_norm: as for `fmeta.functionalize`.

    Returns:
        ``record(params, buffers, *args, **kwargs) -> {name: (input, output)}``, in the order in
        which the submodules finished. ``input`` is the first argument by position. It raises
        ValueError for a submodule that the forward did not call, or called more than once, and
        for what ``apply`` refuses.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``, ``names`` is a string, or what
            `fmeta.functionalize` raises.
        ValueError: a name that no submodule has, or nothing to record; or what
            `fmeta.functionalize` raises.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> record = activations(net)
        >>> seen = record(dict(net.named_parameters()), {}, torch.ones(5, 3))
        >>> {name: (tuple(x.shape), tuple(y.shape)) for name, (x, y) in seen.items()}
        {'0': ((5, 3), (5, 2)), '2': ((5, 2), (5, 1))}
    """
    from fmeta.functional import functionalize  # which gives this function its public place

    if not isinstance(module, nn.Module):
        raise TypeError(f"activations wants a torch.nn.Module, got {type(module).__name__}")
    if isinstance(names, str):
        raise TypeError(f"names must be several, got a string: give [{names!r}]")
    found = dict(module.named_modules())
    if names is None:
        names = [name for name, m in found.items() if isinstance(m, types)]
    for name in names:
        if name not in found:
            raise ValueError(
                f"{type(module).__name__} has no submodule {name!r}: there are "
                f"{', '.join(map(repr, found))}"
            )
    if not names:
        raise ValueError(
            f"{type(module).__name__} has no submodule of the types "
            f"{', '.join(t.__name__ for t in types)}: give other types, or names"
        )
    apply = functionalize(_Recorder(module, tuple(names)), batch_norm=batch_norm)[0]

    def record(
        params: Tensors, buffers: Tensors, /, *args: Any, **kwargs: Any
    ) -> dict[str, tuple[Any, Any]]:
        seen: dict[str, tuple[Any, Any]] = apply(_below(params), _below(buffers), *args, **kwargs)
        return seen

    return record


def layer_activity(
    inputs: Tensor,
    outputs: Tensor,
    weight: str,
    bias: str | None = None,
    *,
    out_first: bool = True,
    error: Tensor | None = None,
) -> dict[str, dict[str, Tensor]]:
    """The activity of a dense layer, laid beside its parameters as rules read it.

    A rule that needs ``"activations"`` gets a list of layers, from the inputs of the model to its
    outputs. A layer is a dict by the paths of its parameters, as `fmeta.trees.paths` writes them;
    each parameter of shape ``(*leaf)`` has ``"inputs"`` and ``"outputs"``, of shapes that broadcast
    to ``(batch, *leaf)``: the activity before and after each of its numbers.

    Args:
        inputs: of the layer, ``(..., in)``; all leading dimensions are the batch.
        outputs: ``inputs @ weight + bias``, ``(..., out)``, before any nonlinearity.
        weight: path of the weight.
        bias: path of the bias ``(out,)``; None: there is none.
        out_first: whether the weight is ``(out, in)``, as that of ``nn.Linear``, or ``(in, out)``.
        error: what was wanted of the outputs minus what they were, ``(..., out)``, for a layer that
            is told so.

    Returns:
        The layer: ``{path: {"inputs": ..., "outputs": ..., ["error": ...]}}``.

    Example:
        >>> layer = layer_activity(torch.ones(8, 3), torch.ones(8, 2), "0.weight", "0.bias")
        >>> [tuple(x.shape) for x in layer["0.weight"].values()]
        [(8, 1, 3), (8, 2, 1)]
        >>> [tuple(x.shape) for x in layer["0.bias"].values()]
        [(8, 1), (8, 2)]
    """
    x, z = inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])
    before, after = (1, 2) if out_first else (2, 1)
    told = {} if error is None else {"error": error.reshape(z.shape)}
    layer = {
        weight: {
            "inputs": x.unsqueeze(before),
            **{k: v.unsqueeze(after) for k, v in {"outputs": z, **told}.items()},
        }
    }
    if bias is not None:
        layer[bias] = {"inputs": torch.ones_like(z.narrow(1, 0, 1)), "outputs": z, **told}
    return layer


def _below(tensors: Any) -> Any:
    if not isinstance(tensors, dict):
        return tensors  # what is wrong with it, `apply` says
    return {_PREFIX + name: x for name, x in tensors.items()}


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


class _Recorder(nn.Module):
    """A module that returns what went through its submodules in place of its output."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, tuple[Any, Any]]:
        seen: dict[str, tuple[Any, Any]] = {}
        given: dict[str, Any] = {}

        # Copies: what comes after (a ReLU in place) may change the very tensors.
        def keeper(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                if inputs:
                    given[name] = trees.map(_copied, inputs[0])

            return hook

        def recorder(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                if name in seen:
                    raise ValueError(
                        f"the submodule {name!r} was called more than once: its activations have "
                        "no one value; name submodules that are called once"
                    )
                if not inputs:
                    raise ValueError(
                        f"the submodule {name!r} was called by keywords only: pass its input by "
                        "position, or name other submodules"
                    )
                seen[name] = (given[name], trees.map(_copied, output))

            return hook

        handles = []
        try:
            for name in self.names:
                part = self.module.get_submodule(name)
                handles.append(part.register_forward_pre_hook(keeper(name)))
                handles.append(part.register_forward_hook(recorder(name)))
            self.module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.names if name not in seen]
        if missing:
            raise ValueError(
                f"the forward did not call {', '.join(map(repr, missing))}: leave such names out"
            )
        return seen
