"""The score-function estimator (REINFORCE): learning to optimize as reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._autodiff import grad_and_value
from fmeta._numbers import as_python, check_real
from fmeta.distributed import Ranks, Share
from fmeta.estimators._arguments import check_arguments, check_state, checked_seed
from fmeta.estimators._averages import first_bad_step, mean_over_tasks
from fmeta.estimators._contract import (
    Bind,
    Estimate,
    Estimator,
    MetaLoss,
    bind_opt_params,
    bound_start,
    check_meta_params,
    last_loss,
    scored,
)
from fmeta.estimators._episodes import Drawn, Episodes, chunks_of
from fmeta.estimators._mixture import over_families
from fmeta.estimators._normalized import NORMALIZERS, normalized
from fmeta.estimators._policy import Policy, Seen, check_std
from fmeta.estimators._return_baselines import BASELINES, Baseline, returns_to_go
from fmeta.optimizer import Optimizer
from fmeta.tasks import Mixture, TaskFamily, sample_task, stack_tasks
from fmeta.tasks._family import device_of_tasks

__all__ = ["score_function"]

Tree = Any


class ScoreFunctionState(NamedTuple):
    """Where the stream of tasks stands, and what the baseline knows; the same on all ranks.

    Attributes:
        seed: the seed of the run.
        step: the number of estimates made.
        baseline: tensors by name; of ``"moving"`` the mean return of each step, of ``"learned"``
            and ``"fitted_rollouts"`` the normal equations of their least squares.
    """

    seed: int
    step: int
    baseline: dict[str, Tensor]


def score_function(
    optimizer: Optimizer,
    family: TaskFamily | Mixture,
    *,
    num_tasks: int,
    horizon: int,
    std: Any,
    relative: bool = False,
    num_rollouts: int = 1,
    discount: float = 1.0,
    baseline: str | None = "moving",
    normalize: str | None = None,
    recurrent: bool = True,
    bind: Bind | None = None,
    meta_loss: MetaLoss | None = None,
    eval_split: str | None = None,
    checkpoint: str | int | None = None,
    chunk_size: int | None = None,
    trace: bool = True,
    ranks: Ranks | None = None,
) -> Estimator:
    """REINFORCE: the rule gives the mean of a step, noise is added, and what pays is made likely.

    With the rule's delta ``mu_t`` at what it sees (parameters, gradients, hidden state, ...) and
    ``z_t`` standard normal, training makes the steps ``delta_t = mu_t + sigma z_t``. The gradient
    of the expected mean of values ``v_s`` (losses: rewards ``-v_s``) over a training is that of

        ``1/T sum_t log p(delta_t) (G_t - b_t),   G_t = sum_{s > t} discount^(s - t - 1) v_s``

    by what chooses the steps alone: neither the loss nor the path of training is differentiated, so
    the loss may be any function of the parameters, and nothing grows exponentially with the
    horizon. It is unbiased for the loss *of trainings with this noise*, with ``discount=1``;
    smaller ones leave out what comes late (biased, with less noise). The variance grows with the
    number of parameters and falls with ``sigma``, which pulls the smoothed objective away from the
    one without noise: it is an estimator for small models.

    Args:
        optimizer: the rule being learned.
        family: where the tasks come from; of a `fmeta.tasks.mixture` each family gets its share
            of the tasks.
        num_tasks: fresh tasks in an estimate.
        horizon: inner steps T of a training; an estimate consists of whole ones.
        std: ``sigma``, a positive number; or a tree like the model's parameters of numbers, or of
            tensors that broadcast to them; or a function ``std(meta_params, config)`` that gives
            one of these, to learn it: then its part in the density is differentiated too.
        relative: ``sigma`` is ``std`` times the root mean square of ``mu_t`` over its tensor. This
            factor is held fixed in the gradient: steps are not made smaller to have less noise.
        num_rollouts: trainings R of each task, with the same batches and other noise.
        discount: between 0 and 1.
        baseline: ``b_t``, which makes the gradient less noisy and does not change its mean:

            - ``"moving"``: the mean of ``G_t`` over earlier estimates, for each t;
            - ``"learned"``: a linear function of features of t and the loss before the step, fitted
              by least squares to earlier estimates;
            - ``"rollouts"``: the mean of ``G_t`` over the task's other rollouts;
            - ``"fitted_rollouts"``: the same, and for each t a slope, fitted by least squares to
              earlier estimates, times how far the loss before the step is from theirs;
            - None: 0.

            ``"moving"`` and ``"learned"`` take the mean of all other trainings in the first
            estimate, ``"fitted_rollouts"`` a slope of 0.
        normalize: what ``G_t - b_t`` is divided by: its standard deviation among the task's other
            rollouts (at least two), so that tasks whose losses are large do not drown the others:

            - ``"task"``: one of each training. The gradient is unbiased for a weighted mean of the
              tasks' losses, and unchanged where a task's losses are multiplied by a number;
            - ``"step"``: one of each step, so that late steps, where losses differ little, count
              as much as the first ones: each step's own gradient keeps its direction, their sum is
              that of no loss. For losses that fall by orders of magnitude;
            - None: 1.
        recurrent: the hidden state of the rule counts as part of the policy, differentiated through
            all steps before, where it depends on what is learned (an LSTM, learned decays): without
            it the gradient is biased for those. For all other rules False gives the same, faster:
            hidden states are constants, and all steps are differentiated at once.
        bind: ``bind(meta_params, config) -> (opt_params, model_params or None)``; says what is
            learned. Model parameters must not depend on ``meta_params``.
        meta_loss: ``meta_loss(losses, eval_losses, t, horizon)``, elementwise on tensors ``(T,
            tasks, rollouts)``: the values ``v_s``. Default: ``eval_losses`` with ``eval_split``,
            else ``losses``.
        eval_split: the split from which a batch is evaluated after each inner step; None: none.
            With it a value is that of after the step, so ``G_t`` begins with ``v_t``.
        checkpoint: of the recurrent gradient, as in `fmeta.scan`.
        chunk_size: tasks worked on together; None: all.
        trace: the inner step is recorded once and replayed, with the same results; False where
            ``family.loss``, the rule, ``bind`` or ``std`` are no pure functions of tensors: a
            Python number that they read is read once, so noise that falls comes by ``meta_params``.
        ranks: who share the tasks (`fmeta.distributed.joined`); default this process alone. The
            baseline is over the tasks of all of them.

    Returns:
        An `Estimator`. Everything drawn for task i of estimate k is a function of ``(seed, k, i)``,
        noise also of the rollout. Its loss is that of trainings with noise. Metrics are those of
        `Estimate`, with ``"losses"`` ``(T, tasks, rollouts)``, and ``"baseline_explains"``: the
        share of the squared returns that the baseline takes away.

    Raises:
        ValueError: numbers below 1, ``std`` not above 0, ``discount`` outside of 0 to 1, an unknown
            baseline or ``normalize``, one of other rollouts where there are too few, an optimizer
            that needs what the family's ``extras`` do not give; later, a ``meta_loss``, a start or
            a ``std`` of another shape, a ``std`` that is not above 0 where it is a function, model
            parameters that depend on ``meta_params``, a state of another baseline.
        TypeError: no optimizer, no family, no function (or one of other arguments), no flag, no
            number; later, a meta-parameter that is no floating tensor, a seed that is no integer,
            a state of another estimator.

    Reference:
        Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
        learning" (1992). Optimization as a policy: Li and Malik 1606.01885 and 1703.00441, who find
        the policy by guided policy search (local linear-Gaussian controllers, imitated by a
        network) in place of this gradient. Through hidden states: Wierstra et al., "Recurrent
        policy gradients" (2010).
    """
    check_arguments(
        optimizer,
        num_tasks=num_tasks,
        horizon=horizon,
        relative=relative,
        num_rollouts=num_rollouts,
        recurrent=recurrent,
        bind=bind,
        meta_loss=meta_loss,
        eval_split=eval_split,
        chunk_size=chunk_size,
        trace=trace,
        ranks=ranks,
    )
    std = std if callable(std) else as_python(std)
    check_std(std)
    check_real(discount=discount)
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be between 0 and 1, got {discount}")
    if baseline not in BASELINES:
        names = ", ".join(map(repr, BASELINES))
        raise ValueError(f"unknown baseline {baseline!r}: there are {names}")
    if baseline in ("rollouts", "fitted_rollouts") and num_rollouts < 2:
        raise ValueError(
            f"baseline={baseline!r} compares rollouts of a task: give num_rollouts >= 2"
        )
    if normalize not in NORMALIZERS:
        names = ", ".join(map(repr, NORMALIZERS))
        raise ValueError(f"unknown normalize {normalize!r}: there are {names}")
    if normalize is not None and num_rollouts < 3:
        raise ValueError(
            f"normalize={normalize!r} is by the spread of other rollouts: give num_rollouts >= 3"
        )

    def build(family: TaskFamily, share: Share) -> Estimator:
        policy = Policy(
            optimizer,
            family,
            bind or bind_opt_params,
            std,
            relative=relative,
            recurrent=recurrent,
            evaluate=eval_split is not None,
            trace=trace,
        )
        episodes = Episodes(family, share.worked_on, num_rollouts, horizon, eval_split)
        lag = 1 if eval_split is None else 0
        credit = Credit(
            meta_loss or last_loss, float(discount), lag, BASELINES[baseline](), normalize
        )
        return _of_family(policy, episodes, credit, checkpoint, chunk_size, share)

    return over_families(build, family, num_tasks, ranks or Ranks.alone())


class Credit(NamedTuple):
    """What each step is held responsible for."""

    score: MetaLoss
    discount: float
    lag: int
    baseline: Baseline
    normalize: str | None

    def returns(self, losses: Tensor, evals: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values and returns-to-go of some tasks, ``(T, tasks, rollouts)``."""
        steps, tasks = losses.shape[:2]
        t = torch.arange(steps, device=losses.device)[:, None].expand(steps, tasks)
        values = scored(self.score, losses, evals, t, torch.full_like(t, steps), by_step=True)
        return values, returns_to_go(values, self.discount, self.lag)


def _of_family(
    policy: Policy,
    episodes: Episodes,
    credit: Credit,
    checkpoint: str | int | None,
    chunk_size: int | None,
    share: Share,
) -> Estimator:
    family, rollouts = episodes.family, episodes.rollouts
    shapes = _shapes(credit.baseline.init(episodes.horizon))

    def init(meta_params: Tree, seed: int) -> ScoreFunctionState:
        check_meta_params(meta_params)
        seed = checked_seed(seed)
        config, params, _ = sample_task(family, 1, seed)
        _refuse_learned_start(policy.bind, meta_params, config, params)
        policy.check_std(meta_params, *stack_tasks([(config, params)]))
        return ScoreFunctionState(seed, 0, credit.baseline.init(episodes.horizon))

    def roll_out(meta_params: Tree, drawn: Drawn, horizon: Tensor) -> Any:
        """The trainings of some tasks: what was seen, ``(tasks, rollouts, T, ...)``."""

        def start(config: Tree, params: Tree) -> Any:
            return policy.start(meta_params, config, params, horizon)

        starts = torch.vmap(start)(drawn.config, drawn.params)
        spread = (drawn.config, starts, drawn.batches, drawn.shown)
        config, starts, batches, shown = trees.map(
            lambda x: x.repeat_interleave(rollouts, 0), spread
        )
        noise = trees.map(lambda x: x.flatten(0, 1), drawn.noise)
        by_step = trees.map(lambda x: x.movedim(1, 0), (batches, shown, noise))
        found = policy.roll_out(meta_params, config, starts, *by_step)
        return trees.map(lambda x: x.movedim(1, 0).unflatten(0, (-1, rollouts)), tuple(found))

    def total(meta_params: Tree, drawn: Drawn, seen: Seen, weights: Tensor, horizon: Tensor) -> Any:
        """Each task with meta-parameters of its own: the gradient of the sum is that of each."""

        def one(meta_params: Tree, config: Tree, seen: Seen, noise: Tree, weight: Tensor) -> Tensor:
            scores = torch.vmap(
                lambda seen, z: policy.scores(
                    meta_params, config, seen, z, horizon, checkpoint=checkpoint
                )
            )(seen, noise)
            return (scores * weight).sum()

        parts = torch.vmap(one)(meta_params, drawn.config, seen, drawn.noise, weights)
        return parts.sum(), ()

    def estimate(
        meta_params: Tree, state: ScoreFunctionState
    ) -> tuple[Estimate, ScoreFunctionState]:
        check_meta_params(meta_params)
        check_state(state, ScoreFunctionState)
        if _shapes(state.baseline) != shapes:
            raise ValueError(
                "the state is of another baseline or horizon: give what this estimator's own init, "
                "or its last estimate, returned"
            )
        with torch.no_grad():  # nothing outside is being differentiated: plain autograd inside
            device = device_of_tasks(family, meta_params)
            drawn = episodes.draw(state.seed, state.step, device)
            if callable(policy.std):
                policy.check_std(meta_params, drawn.config, drawn.params)
            horizon = torch.tensor(episodes.horizon, device=device)
            chunks = chunks_of(drawn, chunk_size)
            found = [roll_out(meta_params, part, horizon) for part in chunks]
            losses = _by_step([seen.loss for seen, _ in found])
            evals = _by_step([e for _, e in found]) if episodes.eval_split is not None else None
            values, own_returns = credit.returns(losses, evals)
            # A baseline is over the tasks of all ranks, so that it is the same on any number.
            by_task = share.gather((losses.movedim(0, -1), own_returns.movedim(0, -1)))
            losses_of_all, returns = (x.movedim(-1, 0) for x in by_task)
            expected, known = credit.baseline.estimate(state.baseline, losses_of_all, returns)
            advantages = returns - expected
            scaled = normalized(advantages, credit.normalize)
            weights = share.part(scaled.movedim(0, -1)) / (episodes.horizon * rollouts)
            parts, first = [], 0
            for part, (seen, _) in zip(chunks, found, strict=True):
                n = len(part.ints)
                own = trees.map(lambda x, n=n: x.expand(n, *x.shape), meta_params)
                weight = weights[first : first + n]
                parts.append(grad_and_value(total, own, part, seen, weight, horizon)[0])
                first += n
            grads = trees.map(lambda *xs: torch.cat(xs), *parts)
            bad_step = first_bad_step(losses, evals, values)
            estimate = mean_over_tasks(
                values.mean((0, 2)), grads, bad_step, {"drawn": drawn.ints}, share=share
            )
            estimate.metrics["losses"] = losses_of_all
            estimate.metrics["baseline_explains"] = 1 - _power(advantages) / _power(returns)
        return estimate, ScoreFunctionState(state.seed, state.step + 1, known)

    return Estimator(init, estimate, share.ranks)


def _shapes(baseline: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in baseline.items()}


def _refuse_learned_start(
    bind: Callable[..., Any], meta_params: Tree, config: Tree, params: Tree
) -> None:
    with torch.enable_grad():
        own = trees.map(lambda x: x.detach().clone().requires_grad_(), meta_params)
        start = bound_start(bind, own, config, params)[1]
    if any(x.requires_grad for x in trees.leaves(start)):
        raise ValueError(
            "bind gives model parameters that depend on meta_params: score_function learns what "
            "chooses the steps, not where training begins; take `full` or `pes` for that"
        )


def _by_step(losses: list[Tensor]) -> Tensor:
    """``(tasks, rollouts, T)`` each as ``(T, tasks, rollouts)``."""
    return torch.cat(losses).movedim(-1, 0)


def _power(returns: Tensor) -> Tensor:
    """Mean square of those that are finite."""
    return returns.square().nan_to_num(0.0, 0.0, 0.0).mean()
