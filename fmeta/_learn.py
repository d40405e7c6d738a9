"""`learn`: turns a hand-made optimizer's hyper-parameters into what meta-training changes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from fmeta import trees
from fmeta._chunks import chunkable, form_in_chunks
from fmeta._leafwise import applied_as_is, is_leafwise, leafwise
from fmeta.optimizer import Hidden, Optimizer

__all__ = ["TRANSFORMS", "learn"]

Tree = Any


def _log1m_inverse(u: Tensor) -> Tensor:
    return -torch.expm1(u)


# name: (to the learned coordinate, back to natural units, domain in words, its open interval)
TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str, tuple[float, float]]] = {
    "linear": (lambda x: x, lambda u: u, "finite", (-math.inf, math.inf)),
    "log": (torch.log, torch.exp, "positive", (0, math.inf)),
    "log1m": (lambda x: torch.log1p(-x), _log1m_inverse, "below 1", (-math.inf, 1)),
    "logit": (torch.logit, torch.sigmoid, "between 0 and 1", (0, 1)),
}


def learn(
    builder: Callable[..., Optimizer], transforms: Mapping[str, str], **arguments: Any
) -> Optimizer:
    """Makes named hyper-parameters of a hand-made optimizer learnable.

    ``opt_params`` holds them in a transformed coordinate, in which any real number is allowed;
    `update` inverts the transform and calls the builder with the values.

    Args:
        builder: a builder such as `fmeta.optimizers.adam`, whose own ``opt_params`` are empty.
        transforms: name of each learned argument -> ``"linear"``, ``"log"`` (log x), ``"log1m"``
            (log(1 - x)) or ``"logit"`` (log(x / (1 - x))), on every element of a tuple or tree.
        **arguments: the builder's arguments: start values of the learned ones (the builder's
            default where one is not given) and constants. Tensors keep their dtype and may be
            differentiated (``init`` gives copies of them), Python numbers become float32.

    Returns:
        An `Optimizer` with ``opt_params = {name: value in the transformed coordinate}``.

    Raises:
        ValueError: unknown argument or transform (naming the known ones), a start value outside of
            the transform's domain, or a builder with ``opt_params`` of its own.

    Example:
        >>> import fmeta
        >>> adam = learn(fmeta.optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=1e-2)
        >>> adam.init()["betas"]
        (tensor(-2.3026), tensor(-6.9078))
    """
    signature = inspect.signature(builder)
    known = [
        name
        for name, p in signature.parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    label = getattr(builder, "__name__", repr(builder))
    for name in (*transforms, *arguments):
        if name not in known:
            raise ValueError(
                f"{label} has no argument {name!r} to learn or set; it has {', '.join(known)}"
            )
    for name, transform in transforms.items():
        if transform not in TRANSFORMS:
            raise ValueError(
                f"unknown transform {transform!r} for {name!r}: choose of {', '.join(TRANSFORMS)}"
            )
        if name not in arguments and signature.parameters[name].default is inspect.Parameter.empty:
            raise ValueError(f"{label} has no default for {name!r}: give learn(..., {name}=...)")
    constants = {k: v for k, v in arguments.items() if k not in transforms}
    starts = {name: arguments.get(name, signature.parameters[name].default) for name in transforms}
    learned = {
        name: trees.map(lambda x, n=name: _to_coordinate(x, transforms[n], n), value)
        for name, value in starts.items()
    }
    base = builder(**constants, **starts)
    if trees.leaves(base.init(None)):
        raise ValueError(
            f"{label} has learned parameters of its own: `learn` is for builders whose opt_params "
            "are empty"
        )

    def natural(opt_params: Tree, model_params: Tree) -> Optimizer:
        extra = set(opt_params) - set(transforms) if isinstance(opt_params, dict) else set()
        if extra:
            raise ValueError(
                f"opt_params of the learned {label} hold {', '.join(map(str, extra))}, which "
                "is not learned: give the dict that init() returns"
            )
        absent = [k for k in transforms if not isinstance(opt_params, dict) or k not in opt_params]
        if absent:
            raise ValueError(
                f"opt_params of the learned {label} lack {', '.join(absent)}: give the dict that "
                "init() returns"
            )
        widest = _widest(model_params)
        values = {
            name: trees.map(
                lambda u, back=TRANSFORMS[transform][1]: back(_at_least(widest, u)),
                opt_params[name],
            )
            for name, transform in transforms.items()
        }
        return builder(**constants, **values)

    def init(generator: torch.Generator | None = None) -> Tree:
        return trees.map(torch.clone, learned)  # a copy keeps the path to a traced start

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        return natural(opt_params, model_params).init_hidden({}, model_params, num_steps=num_steps)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        return natural(opt_params, model_params).update({}, model_params, grads, hidden, **extra)

    applied_as_is(update, base)
    if is_leafwise(base):
        leafwise(update)
    if form_in_chunks(base):

        def in_chunks(coordinates: int) -> Callable[..., Any]:
            def update(
                opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
            ) -> tuple[Tree, Hidden]:
                form: Any = form_in_chunks(natural(opt_params, model_params))
                return form(coordinates)({}, model_params, grads, hidden, **extra)

            return leafwise(update)

        chunkable(update, in_chunks)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        return natural(opt_params, model_params).eval_params({}, model_params, hidden)

    return Optimizer(init, init_hidden, update, base.needs, eval_params)


def _to_coordinate(value: Any, transform: str, name: str) -> Tensor:
    forward, _, domain, (low, high) = TRANSFORMS[transform]
    if isinstance(value, Tensor):
        if _has_values(value):
            outside = value.detach()[~((low < value) & (value < high))]
            if outside.numel():
                raise ValueError(
                    f"{name!r} holds {outside[0].item():g}, which is not {domain}, as transform "
                    f'"{transform}" needs'
                )
        return forward(value).clone()  # "linear" would keep the caller's own tensor
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"{name!r} cannot be learned: its start value is {value!r}, not a number, tensor or "
            "tree of these"
        )
    if not low < value < high:
        raise ValueError(f'{name} = {value} is not {domain}, as transform "{transform}" needs')
    # In float64 first: log(1 - 0.999) in float32 would be off by 2e-5.
    return forward(torch.tensor(value, dtype=torch.float64)).to(torch.float32)


def _has_values(x: Tensor) -> bool:
    """Whether one may look at them: not while they are traced, batched, or absent."""
    traced = torch.compiler.is_compiling() or _functorch.is_functorch_wrapped_tensor(x)
    return type(x) in (Tensor, torch.nn.Parameter) and not traced and not x.is_meta


def _widest(model_params: Tree) -> torch.dtype:
    """The widest compute dtype among the parameters."""
    dtype = torch.float32
    for found in {p.dtype for p in trees.leaves(model_params) if isinstance(p, Tensor)}:
        if found.is_floating_point:
            dtype = torch.promote_types(dtype, found)
    return dtype


def _at_least(dtype: torch.dtype, x: Any) -> Any:
    """Cast before a transform is inverted, whose rounding would otherwise stay."""
    return x.to(torch.promote_types(x.dtype, dtype)) if isinstance(x, Tensor) else x
