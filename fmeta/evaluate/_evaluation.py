"""What an evaluation found: numbers of each seed, curves over all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fmeta.evaluate._compare import Curves
from fmeta.evaluate._measure import log_spaced
from fmeta.evaluate._statistics import Difference, Summary, paired, summarize
from fmeta.evaluate._tune import Search

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Band", "Evaluation", "Outcome", "band"]

_MAX_POINTS = 100


class Band(NamedTuple):
    """A curve over seeds, small enough for a file; each of shape ``(K,)``, float64.

    Attributes:
        steps: numbers of updates, increasing, about evenly spaced in log.
        mean, low, high: over the seeds; NaN where one had diverged.
    """

    steps: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor


class Outcome(NamedTuple):
    """How one optimizer ended, each tensor of shape ``(seeds,)``, float64.

    Attributes:
        label: what tables and figures call it.
        role: ``"contender"`` or ``"baseline"``.
        train_loss: mean training loss of the last tenth of the steps; inf where diverged.
        held_out_loss: at the final parameters, mean over fresh batches; inf where diverged.
        metrics: the family's metrics there by name (``accuracy``, ...); NaN where diverged.
        steps: until the training loss had come down to the reference's final one
            (`steps_to_reach`); inf where it never did; None without a reference.
        diverged: bool, a loss that was not finite.
        train: the training loss, each point the mean of the steps since the point before.
        held_out: the held-out loss, each point the mean of four fresh batches.
        search: how a baseline's learning rate was found; None when it was given, or none needed.
        lr: a baseline's learning rate.
        curves: losses of all seeds, ``train (seeds, T)`` and ``held_out (seeds, K)``; None in one
            that was read from a file.
    """

    label: str
    role: str
    train_loss: Tensor
    held_out_loss: Tensor
    metrics: dict[str, Tensor]
    steps: Tensor | None
    diverged: Tensor
    train: Band
    held_out: Band
    search: Search | None = None
    lr: float | None = None
    curves: Curves | None = None


class Evaluation(NamedTuple):
    """Optimizers side by side on the same tasks.

    Attributes:
        outcomes: `Outcome` by name, the contenders first.
        num_steps: inner steps T.
        num_seeds: tasks.
        seed: of the tasks.
        reference: name of the optimizer whose final training loss ``steps`` counts to, or None.
    """

    outcomes: dict[str, Outcome]
    num_steps: int
    num_seeds: int
    seed: int
    reference: str | None = None

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of what can be summarized: losses, metrics, steps."""
        first = next(iter(self.outcomes.values()))
        steps = () if first.steps is None else ("steps",)
        return ("train_loss", "held_out_loss", *first.metrics, *steps)

    def values(self, name: str, quantity: str) -> Tensor:
        """A quantity of each seed.

        Args:
            name: of an optimizer, a key of ``outcomes``.
            quantity: one of ``quantities``.

        Raises:
            ValueError: for an unknown name, with those that there are.
        """
        for value, known in ((name, self.outcomes), (quantity, self.quantities)):
            if value not in known:
                raise ValueError(f"there is no {value!r} here, but {', '.join(known)}")
        outcome = self.outcomes[name]
        if quantity in outcome.metrics:
            return outcome.metrics[quantity]
        found: Tensor = getattr(outcome, quantity)
        return found

    def summary(self, name: str, quantity: str) -> Summary:
        """Mean, interval and median of a quantity, as in `values`."""
        return summarize(self.values(name, quantity))

    def paired(self, a: str, b: str, quantity: str, *, log: bool = False) -> Difference:
        """Paired difference of a quantity, a minus b.

        Args:
            a, b: names of optimizers.
            quantity: one of ``quantities``.
            log: of logarithms: its exponential is the ratio of a to b.
        """
        x, y = self.values(a, quantity), self.values(b, quantity)
        return paired(x.log(), y.log()) if log else paired(x, y)

    def table(self, title: str | None = None) -> Table:
        """A `rich.table.Table` of all optimizers; print it with `rich.print`."""
        from fmeta.evaluate._table import table

        return table(self, title)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, curves as bands; summaries and paired differences are added."""
        from fmeta.evaluate._json import to_dict

        return to_dict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_dict` gave, without ``curves``.

        Raises:
            ValueError: when it is something else.
        """
        from fmeta.evaluate._json import from_dict

        return from_dict(value)


def band(losses: Tensor, at: list[int] | None = None) -> Band:
    """Mean and range over seeds.

    Args:
        losses: shape ``(seeds, K)``.
        at: steps of the K values; None: they are of steps 1 to K, and are thinned out, each point
            the mean of the steps since the point before.
    """
    losses = losses.double().cpu()
    if at is None:
        at = log_spaced(losses.shape[1], _MAX_POINTS)
        parts = zip((0, *at), at, strict=False)
        losses = torch.stack([losses[:, i:j].mean(1) for i, j in parts], 1)
    losses = torch.where(losses.isfinite(), losses, torch.nan)
    curves = (losses.mean(0), losses.amin(0), losses.amax(0))
    return Band(torch.tensor(at, dtype=torch.float64), *map(_rounded, curves))


def _rounded(values: Tensor) -> Tensor:
    """To six digits, finer than a pixel: a file stays short and gives back the same numbers."""
    return torch.tensor([float(f"{x:.6g}") for x in values.tolist()], dtype=torch.float64)
