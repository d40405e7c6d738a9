"""`averaged`: evaluates with an average of the parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leafwise import applied_as_is, is_leafwise, leafwise
from fmeta._numbers import check_number
from fmeta.combinators._parts import start as started
from fmeta.combinators._wrapped import unwrapped, whole, wrapped
from fmeta.optimizer import Hidden, Optimizer, check_optimizer_type

__all__ = ["averaged"]

Tree = Any
_KEYS = ("average", "count")


def averaged(
    optimizer: Optimizer, decay: Any = 0.999, *, start: Any = 0, debias: bool = True
) -> Optimizer:
    """Trains as the optimizer does, and evaluates with an average of the parameters on the way.

    With ``p_1, ..., p_T`` the parameters after each update, ``eval_params`` gives after T of them

    - the exponential average ``a_T = decay a_(T-1) + (1 - decay) p_T``, with ``debias`` divided by
      the sum ``1 - decay^T`` of its weights (``a_0 = 0``, as ``optax.ema``), otherwise started from
      ``a_1 = p_1``, whose weight then falls only slowly (as `torch.optim.swa_utils.AveragedModel`
      with ``get_ema_avg_fn``);
    - with ``decay="uniform"`` their mean (Polyak and Ruppert; stochastic weight averaging).

    The parameters of the first ``start`` updates are left out; up to there, and before the first
    update, it gives the parameters themselves. Where the optimizer has an ``eval_params`` of its
    own, its results are averaged.

    The parameters are read where they are given: each update takes in what the one before it left,
    and ``eval_params`` the last ones. So whatever else moves them (the rate of a parameter group in
    `fmeta.torch_optim`, a projection) is averaged as well.

    Args:
        optimizer: any `Optimizer` with a `Hidden` state.
        decay: below 1: a number or scalar tensor; or ``"uniform"``.
        start: how many updates are left out: an integer or an integer scalar tensor.
        debias: for exponential averages.

    Returns:
        An `Optimizer` with the same ``opt_params`` and deltas; hidden at each leaf: ``inner``,
        ``average`` ``(*leaf)`` in the compute dtype (of the parameters up to before the last
        update) and ``count`` (int64) of the leaf's updates. To store moments in half size, wrap
        the optimizer inside in `hidden_dtype`: an average of low precision does not move.

    Raises:
        ValueError: a decay that is negative or not below 1, or another word; ``start`` is no
            integer, or negative.

    Example:
        >>> import fmeta
        >>> rule = averaged(fmeta.optimizers.sgd(1.0), "uniform")
        >>> p = torch.zeros(())
        >>> h = rule.init_hidden({}, p)
        >>> for _ in range(3):
        ...     p, h = rule.step({}, p, torch.ones(()), h)
        >>> p, rule.eval_params({}, p, h)
        (tensor(-3.), tensor(-2.))

    Reference:
        Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992);
        Izmailov et al. 1803.05407 (SWA).
    """
    check_optimizer_type(optimizer, "optimizer")
    if isinstance(decay, str):
        if decay != "uniform":
            raise ValueError(f'decay must be a number below 1 or "uniform", got {decay!r}')
    else:
        check_number("decay", decay, below=1.0)
    whole("start", start, least=0)

    def fold(state: dict[str, Any], param: Tensor) -> Tensor:
        """The average with these parameters in it, which ``count`` updates have led to."""
        average = state["average"]
        x, n = param.to(average.dtype), state["count"] - start
        rate = _rate(decay, n.clamp(min=1).to(average.dtype), debias)
        return torch.where(n > 1, torch.lerp(average, x, rate), x)

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        inner = started(optimizer, opt_params, model_params, num_steps)
        shown = trees.leaves(optimizer.eval_params(opt_params, model_params, inner))
        own = [
            {}
            if p is None
            else {
                "average": p.to(trees.compute_dtype(p), copy=True),
                "count": torch.zeros((), dtype=torch.int64, device=p.device),
            }
            for p in shown
        ]
        return wrapped(model_params, inner, own, inner.shared)

    def update(
        opt_params: Tree, model_params: Tree, grads: Tree, hidden: Hidden, **extra: Any
    ) -> tuple[Tree, Hidden]:
        inner, states = unwrapped(model_params, hidden, hidden.shared, _KEYS)
        found = trees.match(model_params, grads, "the gradient")
        shown = trees.leaves(optimizer.eval_params(opt_params, model_params, inner))
        delta, new = optimizer.update(opt_params, model_params, grads, inner, **extra)
        own = [
            {"average": fold(s, x), "count": s["count"] + 1}
            if s and g is not None
            else {k: s[k] for k in s if k != "inner"}
            for s, x, g in zip(states, shown, found, strict=True)
        ]
        return delta, wrapped(model_params, new, own, new.shared)

    def eval_params(opt_params: Tree, model_params: Tree, hidden: Hidden) -> Tree:
        inner, states = unwrapped(model_params, hidden, hidden.shared, _KEYS)
        flat, spec = trees.flatten(optimizer.eval_params(opt_params, model_params, inner))
        return trees.unflatten(
            spec,
            [fold(s, x).to(x.dtype) if s else x for s, x in zip(states, flat, strict=True)],
        )

    applied_as_is(update, optimizer)
    if is_leafwise(optimizer):
        leafwise(update)
    return optimizer._replace(init_hidden=init_hidden, update=update, eval_params=eval_params)


def _rate(decay: Any, n: Tensor, debias: bool) -> Tensor:
    """Weight of the newest of n parameters."""
    if isinstance(decay, str):
        return 1 / n
    if isinstance(decay, Tensor):
        decay = decay.to(n.device, n.dtype)
    if not debias:
        return torch.zeros_like(n) + (1 - decay)
    return (1 - decay) / -torch.expm1(n * _log(decay))


def _log(decay: Any) -> Any:
    if isinstance(decay, Tensor):
        return decay.clamp_min(torch.finfo(decay.dtype).tiny).log()
    return math.log(decay) if decay else -math.inf
