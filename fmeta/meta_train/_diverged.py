"""Tasks whose inner training diverged: counted and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["describe", "diverged_tasks"]


def diverged_tasks(found: Mapping[str, Any]) -> dict[str, Any]:
    """What an outer step's metrics say about diverged tasks.

    Args:
        found: metrics of an `Estimate`; with ``"diverged"``, booleans of shape ``(num_tasks,)``,
            and where it is known ``"diverged_at"``, the inner step of each or -1.

    Returns:
        ``{}`` when the estimator does not report it; else ``"diverged"``, their share, and, when
        there are some, ``"diverged_tasks"``, a list of ``[task, inner step or -1]``.
    """
    if "diverged" not in found:
        return {}
    flags = found["diverged"].reshape(-1).tolist()
    at = found["diverged_at"].reshape(-1).tolist() if "diverged_at" in found else [-1] * len(flags)
    named = [[task, int(at[task])] for task, flag in enumerate(flags) if flag]
    share = {"diverged": len(named) / max(1, len(flags))}
    return {**share, "diverged_tasks": named} if named else share


def describe(metrics: Mapping[str, Any], *, most: int = 3) -> str:
    """A sentence about the diverged tasks of an outer step; empty when there are none.

    Args:
        metrics: of the outer step, as ``on_step`` gets them.
        most: tasks that are named.

    Example:
        >>> describe({"step": 7, "diverged": 0.5, "diverged_tasks": [[1, 20], [3, -1]]})
        'outer step 7: 2 of 4 tasks diverged and are left out: task 1 at inner step 20, task 3'
    """
    named = metrics.get("diverged_tasks", [])
    if not named:
        return ""
    total = round(len(named) / metrics["diverged"])
    where = [f"task {i}" + (f" at inner step {at}" if at >= 0 else "") for i, at in named[:most]]
    rest = ["..."] if len(named) > most else []
    return (
        f"outer step {metrics['step']}: {len(named)} of {total} tasks diverged and are left out: "
        + ", ".join(where + rest)
    )
