"""Gradient descent with a learned rate of every tensor and step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.optimizer import Hidden, Optimizer, check_params

__all__ = ["per_step_sgd"]

Tree = Any


def per_step_sgd(like: Tree, num_steps: int, lr: float = 0.1) -> Optimizer:
    """``p -= lr[t] * g`` with ``opt_params = {"lr": rates (num_steps,) at each leaf}``.

    Args:
        like: a tree of tensors shaped like the model's parameters.
        num_steps: steps that have rates of their own; later ones have those of the last.
        lr: start value of all rates; natural units, so that a rate may become negative.

    Returns:
        An `Optimizer`; the number of steps made stands in ``hidden.shared``.

    Reference:
        Antoniou, Edwards, Storkey, "How to train your MAML" (1810.09502), section 4, "LSLR".
    """
    check_params(like, allow_none=False)

    def init(generator: Any = None) -> Tree:
        return {"lr": trees.map(lambda p: p.new_full((num_steps,), lr), like)}

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        flat, spec = trees.flatten(model_params)
        device = trees.common_device(model_params)
        t = torch.zeros((), dtype=torch.int64, device=device)
        return Hidden(trees.unflatten(spec, [{} for _ in flat]), {"t": t})

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        flat, spec = trees.flatten(model_params)
        rates = trees.flatten_up_to(spec, opt_params["lr"], model_params, "the rates")
        changes = trees.flatten_up_to(spec, grads, model_params, "the gradient")
        t = hidden.shared["t"]
        place = t.clamp(max=num_steps - 1).reshape(1)

        def move(p: Tensor | None, g: Tensor | None, lr: Tensor) -> Tensor | None:
            if p is None or g is None:
                return None
            dtype = trees.compute_dtype(p)
            return -lr.to(dtype).index_select(0, place).squeeze(0) * g.to(dtype)

        delta = trees.unflatten(spec, map(move, flat, changes, rates))
        return delta, hidden._replace(shared={"t": t + 1})

    return Optimizer(init, init_hidden, update)
