"""Learning rates on a grid, chosen on validation data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta.evaluate._measure import Draws, draw, groups, measure
from fmeta.optimizer import Optimizer
from fmeta.tasks import TaskFamily
from fmeta.tasks._family import device_of_tasks

__all__ = ["Search", "search_rates", "tune"]

# The stream of tasks to tune on: another one than that of the comparison with the same seed.
_TUNING = 1
_EXTENSION, _MAX_EXTENSIONS = 2, 4


class Search(NamedTuple):
    """What a search over learning rates found.

    Attributes:
        rate: the rate of the lowest score.
        rates: all rates tried, increasing.
        scores: of each, the final loss on the validation split, mean over seeds; inf where a seed
            diverged.
        extended: how many rates were added because the best one lay at an edge.
    """

    rate: float
    rates: tuple[float, ...]
    scores: tuple[float, ...]
    extended: int

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest tried: a better one may lie beyond."""
        return len(self.rates) > 1 and self.rate in (self.rates[0], self.rates[-1])


def search_rates(
    family: TaskFamily,
    build: Callable[[Any], Optimizer],
    rates: Sequence[float],
    *,
    num_steps: int,
    num_seeds: int,
    seed: int,
    split: str = "train",
    held_out: str = "validation",
    final_batches: int = 8,
    extend: bool = True,
    refine: bool = True,
    chunk_size: int | None = None,
) -> Search:
    """Trains with each rate and scores it by the final loss on the validation split.

    Args:
        family: where the tasks come from.
        build: ``build(lr) -> Optimizer`` with nothing to learn; ``lr`` may be a traced scalar.
        rates: candidates, positive.
        num_steps: inner steps T.
        num_seeds: tasks that each rate is tried on, the same for all.
        seed: of the tasks; `run` and `compare` with the same seed draw others.
        split: what is trained on.
        held_out: what is scored on.
        final_batches: batches that a score is the mean over.
        extend: while the best rate lies at an edge of the grid, two more are tried beyond it (up to
            four times), in the ratio of the two rates there.
        refine: then, the rates half-way (in log) between the best one and its neighbours are tried.
        chunk_size: models trained at once; None: all rates and seeds.

    Returns:
        A `Search`.

    Raises:
        ValueError: no rates, or one that is not positive; when a seed diverges with every rate.
    """
    if not rates or not all(0 < lr < float("inf") for lr in rates):
        raise ValueError(f"rates must be positive numbers, at least one, got {list(rates)}")
    scored: dict[float, float] = {}

    def best_of(new: Sequence[float]) -> float:
        scores = _scores(
            family,
            build,
            new,
            num_steps,
            num_seeds,
            seed,
            (split, held_out),
            final_batches,
            chunk_size,
        )
        scored.update(zip(new, scores, strict=True))
        return min(sorted(scored), key=scored.__getitem__)

    best = best_of(sorted(rates))
    if scored[best] == float("inf"):
        raise ValueError(f"the final loss is not finite for any of the rates {list(rates)}")
    extended = 0
    for _ in range(_MAX_EXTENSIONS if extend else 0):
        new = _beyond(sorted(scored), best)
        if not new:
            break
        extended += len(new)
        best = best_of(new)
    between = _between(sorted(scored), best) if refine else []
    if between:
        best = best_of(between)
    ordered = sorted(scored)
    return Search(best, tuple(ordered), tuple(scored[lr] for lr in ordered), extended)


def tune(
    family: TaskFamily,
    builder: Callable[[Any], Optimizer],
    rates: Sequence[float],
    *,
    num_steps: int,
    num_seeds: int,
    seed: int,
) -> float:
    """The learning rate with the lowest final loss on validation images, training on others.

    Args:
        family: where the tasks come from.
        builder: ``builder(lr) -> Optimizer``; all rates run together by `vmap`.
        rates: candidates.
        num_steps, num_seeds, seed: as in `search_rates`.

    Returns:
        One of ``rates``. A rate whose loss is not finite never wins.

    Raises:
        ValueError: when a seed diverges with every rate.
    """
    return search_rates(
        family,
        builder,
        rates,
        num_steps=num_steps,
        num_seeds=num_seeds,
        seed=seed,
        extend=False,
        refine=False,
    ).rate


def _beyond(ordered: list[float], best: float) -> list[float]:
    """Rates to try next, beyond the edge that the best one lies at."""
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return []
    ratio = ordered[0] / ordered[1] if best == ordered[0] else ordered[-1] / ordered[-2]
    return [best * ratio ** (k + 1) for k in range(_EXTENSION)]


def _between(ordered: list[float], best: float) -> list[float]:
    """Rates half-way between the best one and its neighbours."""
    i = ordered.index(best)
    near = [ordered[j] for j in (i - 1, i + 1) if 0 <= j < len(ordered)]
    return [(best * x) ** 0.5 for x in near]


def _scores(
    family: TaskFamily,
    build: Callable[[Any], Optimizer],
    rates: Sequence[float],
    num_steps: int,
    num_seeds: int,
    seed: int,
    splits: tuple[str, str],
    final_batches: int,
    chunk_size: int | None,
) -> list[float]:
    device = device_of_tasks(family)
    total = torch.zeros(len(rates), dtype=torch.float64)

    optimizer = _of_rate(build, rates[0])
    per_seed = None if chunk_size is None else max(1, chunk_size // len(rates))
    for members in groups(num_seeds, per_seed):
        drawn = draw(
            family,
            members,
            _TUNING,
            seed=seed,
            num_steps=num_steps,
            num_points=1,
            num_fresh=final_batches,
            split=splits[0],
            held_out=splits[1],
            device=device,
        )
        for part in groups(len(rates), chunk_size):
            some = torch.tensor([rates[i] for i in part], device=device)
            with torch.no_grad():
                found = measure(family, optimizer, *_pairs(some, drawn, num_steps))
            diverged = ~found.train.isfinite().all(1) | ~found.final.isfinite()
            scores = torch.where(diverged, torch.inf, found.final)
            total[list(part)] += scores.double().cpu().reshape(len(part), -1).sum(1)
    return (total / num_seeds).tolist()


def _of_rate(build: Callable[[Any], Optimizer], example: float) -> Optimizer:
    """The optimizers of all rates as one, whose ``opt_params`` are the rate."""

    def init_hidden(lr: Tensor, model_params: Any, *, num_steps: Any = None) -> Any:
        return build(lr).init_hidden({}, model_params, num_steps=num_steps)

    def update(lr: Tensor, model_params: Any, grads: Any, hidden: Any, **inputs: Any) -> Any:
        return build(lr).update({}, model_params, grads, hidden, **inputs)

    def eval_params(lr: Tensor, model_params: Any, hidden: Any) -> Any:
        return build(lr).eval_params({}, model_params, hidden)

    def init(generator: Any = None) -> Tensor:
        return torch.tensor(example)

    return Optimizer(init, init_hidden, update, build(example).needs, eval_params)


def _pairs(rates: Tensor, drawn: Draws, num_steps: int) -> tuple[Tensor, list[int], Draws]:
    """Every rate with every seed, along one dimension: vmaps within each other are slower."""
    count = trees.leaves(drawn)[0].shape[0]
    tiled = trees.map(lambda x: x.repeat(len(rates), *(1,) * (x.ndim - 1)), drawn)
    return rates.repeat_interleave(count), [num_steps], tiled
