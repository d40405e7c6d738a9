"""Modules as pure functions of their parameters."""

from __future__ import annotations

import copy
import gc
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from fmeta._activations import activations, layer_activity
from fmeta._rnn import make_pure

__all__ = ["activations", "functionalize", "layer_activity", "loss_of", "moved"]

Tensors = dict[str, Tensor]


class _Lock:
    """A lock that a pickled or copied function has anew, for threads of its own."""

    def __init__(self) -> None:
        self.held = threading.RLock()

    def __reduce__(self) -> str | tuple[type[_Lock], tuple[()]]:
        return "_SWITCHING" if self is _SWITCHING else (_Lock, ())


_SWITCHING = _Lock()


def functionalize(
    module: nn.Module, *, batch_norm: str | None = None
) -> tuple[Callable[..., Any], Tensors, Tensors]:
    r"""Split a module into a pure function and the tensors it needs.

    ``apply(params, buffers, *args, **kwargs)`` equals ``module(*args, **kwargs)`` when given the
    tensors returned here. It composes with ``grad``, ``jvp``, ``vmap`` and their nestings, also
    for recurrent networks (run in plain tensor operations) and attention (run by the
    kernel that can be differentiated twice, never by the inference fast path).

    The module is left alone, and later changes of it do not reach ``apply``: parameters and
    buffers are copies, and train or eval mode of each submodule is as it was here. Dropout in
    train mode stays random by torch's rules; ``vmap`` then wants ``randomness=``.

    Args:
        module: any initialised ``nn.Module``.
        batch_norm: what normalisation layers with running statistics do. ``None``: use them in
            eval mode, refuse train mode, where a pure function cannot update them. ``"batch"``:
            use the statistics of the batch in both modes and leave the running ones unchanged.

    Returns:
        ``(apply, params, buffers)``. ``params`` and ``buffers`` are dicts named and ordered as
        ``module.named_parameters()`` and ``module.named_buffers()`` name them, without
        ``requires_grad``. Tied tensors stand once, under their first name, and stay tied:
        their gradient is the sum over all uses. ``apply`` raises ValueError for a missing, an
        unexpected or a misshapen tensor, and when the forward changes a parameter or buffer
        (the buffers given are never touched: the forward works on copies). Several threads may
        call it: the calls wait for each other.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``, or cannot be copied.
        ValueError: the module is lazy and not initialised; or a part of it cannot be pure
            (normalisation in train mode, ``max_norm`` of an embedding, a function that holds on
            to the module itself).

    Example:
        >>> import torch
        >>> apply, params, buffers = functionalize(torch.nn.Linear(3, 2))
        >>> {name: tuple(p.shape) for name, p in params.items()}
        {'weight': (2, 3), 'bias': (2,)}
        >>> torch.func.grad(lambda p: apply(p, buffers, torch.ones(3)).sum())(params)["bias"]
        tensor([1., 1.])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"functionalize wants a torch.nn.Module, got {type(module).__name__}")
    if batch_norm not in (None, "batch"):
        raise ValueError(f"batch_norm must be None or 'batch', got {batch_norm!r}")
    _refuse_impure(module, batch_norm)
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    aliases = _aliases(module)
    skeleton = _skeleton(module, batch_norm)
    param_shapes = {name: p.shape for name, p in params.items()}
    buffer_shapes = {name: b.shape for name, b in buffers.items()}
    label = type(module).__name__
    # Strict needs every name of a submodule used twice, and then torch restores it wrongly: there
    # the names are checked by `_check` alone.
    strict = len(aliases) == sum(1 for _ in _all_names(module))
    # The fused attention kernels have no second derivative.
    stock = all(_is_stock(m) for m in module.modules())
    attends = not stock or any(isinstance(m, nn.MultiheadAttention) for m in module.modules())
    # The switch costs some microseconds a call; torch's own layers are known not to need it.
    fused_off = _fused_off if attends else nullcontext
    # functional_call puts the tensors into the module for as long as it runs, the switch holds for
    # the whole process: one thread at a time.
    lock = _SWITCHING if attends else _Lock()

    def apply(params: Tensors, buffers: Tensors, /, *args: Any, **kwargs: Any) -> Any:
        _check(params, param_shapes, "params", label)
        _check(buffers, buffer_shapes, "buffers", label)
        given = {**params, **_copies(buffers)} if buffers else params
        # functional_call writes what the forward left behind into the dict it gets.
        tensors = {alias: given[name] for alias, name in aliases.items()}
        # torch's own layers change no parameter, and those that change a buffer were refused.
        before = [] if stock else [_version(t) for t in given.values()]
        with nullcontext() if torch.compiler.is_compiling() else lock.held, fused_off():
            out = functional_call(skeleton, tensors, args, kwargs, tie_weights=False, strict=strict)
        for (name, tensor), version in zip(given.items(), before, strict=False):
            if _version(tensor) != version:
                raise _changed(label, name, "in place")
        for alias, name in aliases.items():
            if tensors[alias] is not given[name]:
                raise _changed(label, name, "by assignment")
        return out

    return apply, params, buffers


def loss_of(
    module: nn.Module, criterion: Callable[[Any, Any], Tensor], *, batch_norm: str | None = None
) -> Callable[[Tensors, Any], Tensor]:
    """The loss of a module as a pure function of its parameters and a batch ``(x, y)``.

    Args:
        module: as for ``functionalize``; its buffers are bound inside, as constants, and follow
            the parameters to their device.
        criterion: ``(module output, y) -> loss`` of shape ``()``; a function or a module such as
            ``nn.CrossEntropyLoss()``. Parameters of its own, if any, are constants.
        batch_norm: as for ``functionalize``.

    Returns:
        ``loss_fn(params, batch) -> ()``, with ``params`` as ``functionalize(module)`` returns
        them. It raises ValueError for a batch that is not a pair and a loss that is no scalar.

    Raises:
        TypeError: ``criterion`` cannot be called, or what ``functionalize`` raises.
        ValueError: what ``functionalize`` raises.

    Example:
        >>> loss_fn = loss_of(torch.nn.Linear(3, 2), torch.nn.functional.mse_loss)
        >>> params = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        >>> loss_fn(params, (torch.ones(4, 3), torch.ones(4, 2)))
        tensor(1.)
    """
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, got {type(criterion).__name__}")
    apply, _, buffers = functionalize(module, batch_norm=batch_norm)

    def loss_fn(params: Tensors, batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            size = f" of length {len(batch)}" if hasattr(batch, "__len__") else ""
            raise ValueError(
                f"loss_of wants batch = (x, y), got a {type(batch).__name__}{size}; "
                "for another form write loss_fn(params, batch) with functionalize's apply"
            )
        x, y = batch
        bound = buffers
        if buffers and isinstance(params, Mapping):
            devices = {p.device for p in params.values() if isinstance(p, Tensor)}
            if len(devices) == 1:  # a module spread over several keeps its buffers where they are
                bound = moved(buffers, devices.pop())
        loss = criterion(apply(params, bound, x), y)
        if not isinstance(loss, Tensor) or loss.shape != ():
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"criterion must return a scalar tensor, got {got}; reduce it, "
                "e.g. with reduction='mean' or .mean()"
            )
        return loss

    return loss_fn


def moved(buffers: Tensors, device: torch.device) -> Tensors:
    """Buffers on that device; the same dict where they are there already."""
    if all(b.device == device for b in buffers.values()):
        return buffers
    return {name: b.to(device) for name, b in buffers.items()}


def _check(got: Mapping[str, Tensor], want: dict[str, torch.Size], kind: str, label: str) -> None:
    cure = f"give the {kind} that functionalize returned, or tensors named and shaped like them"
    if not isinstance(got, Mapping):
        raise ValueError(f"{kind} of {label} must be a dict, got {type(got).__name__}; {cure}")
    for name, shape in want.items():
        if name not in got:
            raise ValueError(f"{kind} of {label}: {name!r} of shape {tuple(shape)} missing; {cure}")
        found = getattr(got[name], "shape", None)
        if found != shape:
            have = type(got[name]).__name__ if found is None else f"shape {tuple(found)}"
            raise ValueError(
                f"{kind} of {label}: {name!r} has {have}, want shape {tuple(shape)}; {cure}; "
                "batched ones go through torch.func.vmap"
            )
    if len(got) != len(want):
        extra = ", ".join(repr(name) for name in got if name not in want)
        raise ValueError(f"{kind} of {label}: unexpected {extra}; {cure}")


def _fused_off() -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH)


def _copies(buffers: Tensors) -> Tensors:
    # Inference tensors have no version to compare; a tracer cannot ask for the mode.
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return {name: b.clone() for name, b in buffers.items()}
    return {name: b.clone() for name, b in buffers.items()}


def _version(tensor: Tensor) -> int:
    if torch.compiler.is_compiling():  # a tracer's tensors have none
        return 0
    # Under vmap only the innermost tensor counts in-place edits.
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return 0 if tensor.is_inference() else tensor._version


def _changed(label: str, name: str, how: str) -> ValueError:
    return ValueError(
        f"the forward of {label} changed {name!r} {how}, which a pure function cannot keep; "
        "return the new value beside the output, or stop the update (e.g. by .eval())"
    )


def _aliases(module: nn.Module) -> dict[str, str]:
    """Name of each place that holds a tensor -> first name of that tensor.

    A submodule used twice is one place: functional_call would restore it wrongly when named twice.
    """
    first: dict[int, str] = {}
    places = {}
    for kind in ("_parameters", "_buffers"):
        for prefix, m in module.named_modules():
            for key, tensor in getattr(m, kind).items():
                if tensor is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    places[name] = first.setdefault(id(tensor), name)
    return places


def _is_stock(module: nn.Module) -> bool:
    """One of torch's own layers, without hooks or parametrisations."""
    hooked = module._forward_pre_hooks or module._forward_hooks
    return type(module).__module__.startswith("torch.nn.modules.") and not hooked


def _all_names(module: nn.Module) -> Iterator[str]:
    for named in (module.named_parameters, module.named_buffers):
        for name, _ in named(remove_duplicate=False):
            yield name


def _skeleton(module: nn.Module, batch_norm: str | None) -> Any:
    """A copy of the module without storage, safe to change, whose layers are pure."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta", requires_grad=False)
    for m in module.modules():
        for value in vars(m).values():  # constants; those with a history cannot be deep-copied
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
    try:
        skeleton = copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"functionalize could not copy a {type(module).__name__} ({error}); keep locks, files "
            "and the like out of the module, or give its class a __deepcopy__"
        ) from error
    for m in skeleton.modules():
        make_pure(m)
        if isinstance(m, _NormBase) and batch_norm == "batch":
            m.training, m.track_running_stats = True, False
            if isinstance(m, _InstanceNorm):
                m._apply_instance_norm = types.MethodType(  # type: ignore[method-assign]
                    _instance_norm, m
                )
        # Each of these shuts one door to the inference fast path and changes no value;
        # a forward of the user's own may read `training`, so it is left as it is.
        elif isinstance(m, nn.TransformerEncoder):
            m.use_nested_tensor = False
        elif isinstance(m, nn.TransformerEncoderLayer):
            m.activation_relu_or_gelu = 0
        elif isinstance(m, nn.MultiheadAttention):
            own_forward = type(m).forward is not nn.MultiheadAttention.forward
            if not (m.training or own_forward):
                m.training, m.dropout = True, 0.0
    return skeleton


def _instance_norm(norm: _InstanceNorm, x: Tensor) -> Tensor:
    return F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def _refuse_impure(module: nn.Module, batch_norm: str | None) -> None:
    own = {id(m) for m in module.modules()} | {id(p) for p in module.parameters()}
    for path, m in module.named_modules():
        where = f"{type(m).__name__} at {path or 'the top'!r}"
        if any(is_lazy(t) for t in (*m._parameters.values(), *m._buffers.values())):
            raise ValueError(f"{where} is not initialised; run the module once on an input first")
        running = isinstance(m, _NormBase) and m.training and m.track_running_stats
        if running and batch_norm is None:
            kind = "InstanceNorm" if isinstance(m, _InstanceNorm) else "BatchNorm"
            raise ValueError(
                f"{where} is a {kind} in train mode: it would update its running statistics, "
                "which a pure function cannot; call .eval() to use the running statistics, or "
                "pass batch_norm='batch' to use those of the batch and leave the running ones"
            )
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None:
            raise ValueError(
                f"{where} has max_norm={m.max_norm}: its forward would rescale the weight in "
                "place; set max_norm=None and normalise in the forward or in the loss"
            )
        for name, value in vars(m).items():
            if isinstance(value, types.FunctionType) and value.__closure__:
                held = gc.get_referents(*value.__closure__)  # an unset cell holds nothing
                if any(id(content) in own for content in held):
                    # A copied module would still compute with the original's weights.
                    raise ValueError(
                        f"{where}: the function in {name!r} closes over the module, so the "
                        "given params would not reach it; make it a method"
                    )
