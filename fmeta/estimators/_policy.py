"""An update rule as a Gaussian policy over steps: trainings under it, and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._autodiff import check_scalar, grad_and_value
from fmeta._functions import check_function
from fmeta._scan import scan
from fmeta._trace import Traced
from fmeta.estimators._contract import Bind, bound_pair
from fmeta.optimizer import Optimizer, apply_updates
from fmeta.tasks import TaskFamily, extras_of_task, loss_of_task

__all__ = ["Policy", "Seen", "Trajectory", "check_std"]

Tree = Any
Std = Any  # a number, a tree of numbers like the model's parameters, or a function that gives one


class Seen(NamedTuple):
    """What the rule saw before a step.

    Attributes:
        params, grads, hidden: of the model and the optimizer; no hidden states, ``()``, where they
            are to be made again.
        loss: scalar.
        extras: what the rule needs beside, ``()`` for nothing.
    """

    params: Any
    grads: Any
    hidden: Any
    loss: Tensor
    extras: Any


class Trajectory(NamedTuple):
    """Trainings of all members.

    Attributes:
        seen: `Seen` of each step, ``(T, members, ...)``.
        evals: evaluation losses after each step, ``(T, members)``; ``()`` for none.
    """

    seen: Seen
    evals: Any


class Policy:
    """``delta ~ N(mean, sigma^2)``, a coordinate each, where the mean is the rule's own delta.

    Args:
        optimizer: the rule.
        family: what it trains.
        bind: of the estimator.
        std: the deviation.
        relative: whether it is in units of the root mean square of a tensor's mean delta.
        recurrent: whether hidden states are differentiated too, through all steps before.
        evaluate: whether there are evaluation batches.
        trace: whether the step is recorded once and replayed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        family: TaskFamily,
        bind: Bind,
        std: Std,
        *,
        relative: bool,
        recurrent: bool,
        evaluate: bool,
        trace: bool,
    ) -> None:
        self.optimizer, self.bind, self.std = optimizer, bind, std
        self.relative, self.recurrent, self.evaluate = relative, recurrent, evaluate
        self.loss_fn = loss_of_task(family)
        self.extras = extras_of_task(family, optimizer)
        step: Callable[..., Any] = torch.vmap(self._step, in_dims=(None, 0, 0, 0, 0, 0, 0))
        self.step = Traced(step) if trace else step

    def start(self, meta_params: Tree, config: Tree, params: Tree, horizon: Tensor) -> Any:
        """First parameters and hidden state of a training."""
        opt_params, own = bound_pair(self.bind, meta_params, config)
        params = params if own is None else own
        return params, self.optimizer.init_hidden(opt_params, params, num_steps=horizon)

    def roll_out(
        self, meta_params: Tree, config: Tree, start: Any, batches: Tree, shown: Tree, noise: Tree
    ) -> Trajectory:
        """Trainings under the policy, without a graph.

        Args:
            meta_params: shared by all members.
            config, start: ``(members, ...)``; ``start`` is that of `start`.
            batches, shown, noise: ``(T, members, ...)``; the noise is shaped like the parameters.
        """
        params, hidden = start
        seen, evals = [], []
        for t in range(len(trees.leaves(batches)[0])):
            batch, show, z = (trees.map(lambda x, t=t: x[t], b) for b in (batches, shown, noise))
            before = (params, () if self.recurrent else hidden)
            params, hidden, (grads, loss, extras), value = self.step(
                meta_params, config, params, hidden, batch, show, z
            )
            seen.append(Seen(before[0], grads, before[1], loss, extras))
            evals.append(value)
        return Trajectory(trees.stack(seen), torch.stack(evals) if self.evaluate else ())

    def scores(
        self,
        meta_params: Tree,
        config: Tree,
        seen: Seen,
        noise: Tree,
        horizon: Tensor,
        *,
        checkpoint: str | int | None = None,
    ) -> Tensor:
        """Of one training: ``(T,)`` numbers with the derivatives of the log-probabilities of steps.

        Only the rule is evaluated, at what it saw. If recurrent, its hidden states are made again
        from the first on, with the part that ``meta_params`` have in them; else they are constants.
        """
        if not self.recurrent:
            one = torch.vmap(lambda x, z: self._score(meta_params, config, x, z)[0])
            return one(seen, noise)
        first = trees.map(lambda x: x[0], seen.params)
        hidden = self.start(meta_params, config, first, horizon)[1]

        def body(hidden: Tree, x: Any, meta_params: Tree, config: Tree) -> tuple[Tree, Tensor]:
            seen, z = x
            score, hidden = self._score(meta_params, config, seen._replace(hidden=hidden), z)
            return hidden, score

        xs = (seen, noise)
        return scan(body, hidden, xs, consts=(meta_params, config), checkpoint=checkpoint)[1]

    def _step(
        self,
        meta_params: Tree,
        config: Tree,
        params: Tree,
        hidden: Tree,
        batch: Tree,
        shown: Tree,
        noise: Tree,
    ) -> Any:
        opt_params = bound_pair(self.bind, meta_params, config)[0]
        if self.optimizer.reads_grads:
            grads, (loss, _) = grad_and_value(
                lambda p, b, c: (self.loss_fn(p, b, c), ()), params, batch, config
            )
        else:
            loss = self.loss_fn(params, batch, config)
            check_scalar(loss)
            grads = trees.map(torch.zeros_like, params)
        extras = () if self.extras is None else dict(self.extras(params, batch, config))
        seen = Seen(params, grads, hidden, loss, extras)
        mean, hidden = self._mean(opt_params, seen)
        sigma = self._sigma(meta_params, config, params, mean)
        delta = trees.map(lambda m, s, z: None if m is None else m + s * z, mean, sigma, noise)
        after = apply_updates(params, delta)
        value: Any = ()
        if self.evaluate:
            value = self.loss_fn(
                self.optimizer.eval_params(opt_params, after, hidden), shown, config
            )
        return after, hidden, (grads, loss, extras), value

    def _score(
        self, meta_params: Tree, config: Tree, seen: Seen, noise: Tree
    ) -> tuple[Tensor, Tree]:
        """For ``delta = mean + sigma z``: d log p = z / sigma d mean + (z^2 - 1) / sigma d sigma.

        As a product with constants: the difference of delta and mean would lose digits.
        """
        opt_params = bound_pair(self.bind, meta_params, config)[0]
        mean, hidden = self._mean(opt_params, seen)
        sigma = self._sigma(meta_params, config, seen.params, mean)
        total = seen.loss.new_zeros(())
        flat = (trees.leaves(x) for x in (mean, sigma, noise))
        for m, s, z in zip(*flat, strict=True):
            if m is not None:
                fixed = s.detach()
                total = total + (z / fixed * m + (z.square() - 1) / fixed * s).sum()
        return total, hidden

    def _mean(self, opt_params: Tree, seen: Seen) -> tuple[Tree, Tree]:
        extras = seen.extras if isinstance(seen.extras, dict) else None
        delta, hidden = self.optimizer.update(
            opt_params, seen.params, seen.grads, seen.hidden, loss=seen.loss, extras=extras
        )
        return delta, hidden

    def _sigma(self, meta_params: Tree, config: Tree, params: Tree, mean: Tree) -> Tree:
        """Like the parameters; a relative one is held fixed while the mean is differentiated."""
        spec = trees.flatten(params)[1]
        sigma = self._std(meta_params, config, params)
        if self.relative:
            means = trees.flatten_up_to(spec, mean, params, "the optimizer's delta")
            sigma = [
                s if m is None else s * _rms(m.detach()) for s, m in zip(sigma, means, strict=True)
            ]
        return trees.unflatten(spec, sigma)

    def _std(self, meta_params: Tree, config: Tree, params: Tree) -> list[Tensor]:
        """What was given as ``std``, for each tensor of the parameters in its shape."""
        std = self.std(meta_params, config) if callable(self.std) else self.std
        flat, spec = trees.flatten(params)
        if isinstance(std, (int, float, Tensor)):
            many = [std] * len(flat)
        else:
            many = trees.flatten_up_to(spec, std, params, "std")
        return [_like(params, i, p, s) for i, (p, s) in enumerate(zip(flat, many, strict=True))]

    def check_std(self, meta_params: Tree, config: Tree, params: Tree) -> None:
        """Raises a ValueError for deviations that do not fit the model, or are not above 0.

        Args:
            meta_params: at which they are taken, where ``std`` is a function.
            config, params: of some tasks, ``(tasks, ...)``.
        """
        if callable(self.std):
            config, params = trees.map(
                lambda x: x.to(trees.leaves(meta_params)[0].device), (config, params)
            )
        each = torch.vmap(lambda c, p: tuple(self._std(meta_params, c, p)))
        for path, x in zip(trees.paths(params), each(config, params), strict=True):
            wrong = None if x.is_meta else x[~((x > 0) & x.isfinite())]
            if wrong is not None and len(wrong):
                raise ValueError(
                    f"std gives {float(wrong[0])} at path {path}, but it must be positive and "
                    "finite: let it be the exponential of what is learned"
                )


# A tensor whose mean delta is zero has this deviation: with 0 there is no density.
_LEAST = 1e-12


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt().clamp_min(_LEAST)


def _like(params: Tree, i: int, param: Tensor, std: Any) -> Tensor:
    """``std`` of leaf i in the dtype that its deltas have, and in its shape."""
    if not isinstance(std, (int, float, Tensor)):
        raise TypeError(f"std must be a number at path {trees.paths(params)[i]}, got {std!r}")
    wide = torch.as_tensor(std, dtype=trees.compute_dtype(param), device=param.device)
    try:
        return wide.expand(param.shape)
    except RuntimeError:
        raise ValueError(
            f"std at path {trees.paths(params)[i]} has shape {tuple(wide.shape)}, which does not "
            f"broadcast to that of the model's parameter, {tuple(param.shape)}: give a number for "
            "the whole tensor"
        ) from None


def check_std(std: Std) -> None:
    """Raises a ValueError for a deviation that is not above 0, a TypeError for a function."""
    if callable(std):
        check_function("std", std, "meta_params", "config")
        return
    for x in trees.leaves(std):
        for value in x.flatten().tolist() if isinstance(x, Tensor) else [x]:
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"std must be positive and finite, got {value!r}")
