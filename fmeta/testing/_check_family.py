"""`check_family`: the laws of a family of tasks, which estimators and evaluation rely on."""

from __future__ import annotations

from collections.abc import Collection

from fmeta.tasks import TaskFamily

# They register their laws, in this order.
from fmeta.testing import _laws_family_draws, _laws_family_loss  # noqa: F401
from fmeta.testing._check import Report
from fmeta.testing._family_law import FAMILY_LAWS

__all__ = ["FAMILY_LAWS", "check_family"]


def check_family(
    family: TaskFamily,
    *,
    splits: Collection[str] = ("train", "validation", "test"),
    laws: Collection[str] | None = None,
    exclude: Collection[str] = (),
    steps: int = 3,
    num_tasks: int = 3,
    seed: int = 0,
) -> Report:
    """Checks that a family of tasks obeys the laws that estimators and evaluation rely on.

    Every law in ``fmeta.testing.FAMILY_LAWS`` can also be called by itself, as
    ``law(family, split="train", steps=3, num_tasks=3, seed=0)``.

    Args:
        family: fmeta's or your own; of a mixture, each family by itself.
        splits: the splits it has, in which every law is checked.
        laws: names of the laws to run; default all.
        exclude: names of laws that it need not obey.
        steps: number of batches that are drawn.
        num_tasks: how many tasks, all of one structure.
        seed: of all draws.

    Returns:
        A `Report`: which laws were run, in which splits, and why the others were not.

    Raises:
        AssertionError: the first law that does not hold, with its name, the split and a cure.
        ValueError: for an unknown name of a law, or nothing to check.

    Example:
        >>> import fmeta
        >>> report = check_family(fmeta.tasks.quadratic(), laws=["loss_is_scalar"])
        >>> report.held
        {'loss_is_scalar': ('train', 'validation', 'test')}
    """
    if not isinstance(family, TaskFamily):
        raise TypeError(
            f"check_family takes a TaskFamily, got a {type(family).__name__}: of a mixture, check "
            "each of its families"
        )
    for name in (*(laws or ()), *exclude):
        if name not in FAMILY_LAWS:
            raise ValueError(f"there is no law {name!r}; there are {', '.join(FAMILY_LAWS)}")
    for what, value in (("splits", len(splits)), ("steps", steps), ("num_tasks", num_tasks)):
        if value < 1:
            raise ValueError(f"there is nothing to check with {what} of {value}: give at least one")
    held: dict[str, tuple[str, ...]] = {}
    not_run: dict[str, str] = {}
    for name, law in FAMILY_LAWS.items():
        if name in exclude:
            not_run[name] = "excluded"
        elif laws is not None and name not in laws:
            not_run[name] = "not among `laws`"
        elif name == "metrics_are_scalars" and family.metrics is None:
            not_run[name] = "the family has no metrics"
        elif name == "extras_are_tensors" and family.extras is None:
            not_run[name] = "the family has no extras"
        elif name == "splits_differ" and len(splits) == 1:
            not_run[name] = "there is one split only"
        else:
            for split in splits:
                others = {"others": splits} if name == "splits_differ" else {}
                law(family, split=split, steps=steps, num_tasks=num_tasks, seed=seed, **others)
            held[name] = tuple(splits)
    return Report(held, not_run)
