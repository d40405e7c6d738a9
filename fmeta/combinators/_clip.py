"""`clip_by_global_norm` and `clip_by_value`: gradient transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import transforms_gradients
from fmeta._lift import lift
from fmeta._numbers import check_number, check_numbers, nothing_to_learn
from fmeta.combinators._parts import delta_dtype
from fmeta.optimizer import Hidden, Optimizer, check_params

__all__ = ["clip_by_global_norm", "clip_by_value"]

Tree = Any


def clip_by_global_norm(max_norm: Any) -> Optimizer:
    """A transform for `chain`: scales all gradients down when their joint norm is too large.

    ``g * min(1, max_norm / ||g||)`` with the norm over all leaves that have a gradient, in the
    compute dtype of each parameter; the squares are added up in the widest of these.

    Args:
        max_norm: positive number or scalar tensor.

    Reference:
        Pascanu et al. 1211.5063, section 3.2.
    """
    check_number("max_norm", max_norm, positive=True)

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        check_params(model_params)
        return Hidden(trees.map(lambda p: {}, model_params), {})

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        found = trees.match(model_params, grads, "the gradient")
        spec = trees.flatten(model_params)[1]
        g = [
            None if x is None else x.to(trees.compute_dtype(x if p is None else p))
            for x, p in zip(found, trees.leaves(model_params), strict=True)
        ]
        if all(x is None for x in g):
            return grads, hidden
        widest = delta_dtype(g)
        total = torch.stack([x.to(widest).square().sum() for x in g if x is not None]).sum()
        # Where the norm is below the limit the factor is exactly 1 and its derivative 0; the inner
        # `where` keeps the derivative of the root finite for zero gradients.
        above = total > max_norm**2
        factor = torch.where(above, max_norm / torch.where(above, total, 1.0).sqrt(), 1.0)
        return trees.unflatten(
            spec, [None if x is None else x * factor.to(x.dtype) for x in g]
        ), hidden

    transforms_gradients(update)
    return Optimizer(nothing_to_learn, init_hidden, update)


def clip_by_value(bound: Any) -> Optimizer:
    """A transform for `chain`: ``min(max(g, -bound), bound)``, element by element.

    Equals `torch.nn.utils.clip_grad_value_`. An infinity becomes the bound; a NaN stays.

    Args:
        bound: positive: a number, a scalar tensor, or a tree of them (or of tensors of the
            parameters' own shapes) shaped like the parameters.

    Returns:
        An `Optimizer` without hidden state.

    Raises:
        ValueError: a bound that is not positive and finite.
    """
    check_numbers("bound", bound, positive=True)

    def init_leaf(opt_params: Tree, param: Tensor) -> dict[str, Tensor]:
        return {}

    def update_leaf(
        opt_params: Tree, param: Tensor, grad: Tensor, state: dict[str, Tensor], bound: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return grad.clamp(-bound, bound), state

    clip = lift(
        nothing_to_learn,
        init_leaf,
        update_leaf,
        hypers=lambda th: {"bound": bound},
        elementwise=True,
        stacked=False,
    )
    transforms_gradients(clip.update)
    return clip
