"""Tasks whose inner training diverged: counted and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["describe", "diverged_tasks"]


def diverged_tasks(found: Mapping[str, Any]) -> dict[str, Any]:
    """What an outer step's metrics say about diverged tasks.

    Args:
        found: metrics of an `Estimate`: ``"diverged"``, booleans ``(tasks,)``, and where known
            ``"diverged_at"``, the inner step of each or -1, ``"family"`` of a mixture, and
            ``"drawn"`` ``(tasks, integers)``.

    Returns:
        ``{}`` when the estimator does not report it; else ``"diverged"``, their share, and, when
        there are some, ``"diverged_tasks"``: for each ``{"task": i}`` with ``"family"``,
        ``"inner_step"`` and ``"drawn"`` where they are known.
    """
    if "diverged" not in found:
        return {}
    flags = found["diverged"].reshape(-1).tolist()
    columns = {
        name: found[key].tolist()
        for name, key in (("family", "family"), ("inner_step", "diverged_at"), ("drawn", "drawn"))
        if key in found
    }
    named = [
        {"task": i, **{k: v[i] for k, v in columns.items() if v[i] != -1}}
        for i, flag in enumerate(flags)
        if flag
    ]
    share = {"diverged": len(named) / max(1, len(flags))}
    return {**share, "diverged_tasks": named} if named else share


def describe(metrics: Mapping[str, Any], *, most: int = 3) -> str:
    """A sentence about the diverged tasks of an outer step; empty when there are none.

    Args:
        metrics: of the outer step, as ``on_step`` gets them.
        most: tasks that are named.

    Example:
        >>> tasks = [{"task": 1, "inner_step": 20, "drawn": [0, 6, 1, 1]}]  # the training of step 6
        >>> describe({"step": 7, "diverged": 0.25, "diverged_tasks": tasks})
        'outer step 7: 1 of 4 tasks diverged: task 1 at inner step 20 (drawn from 0, 6, 1, 1)'
    """
    named = metrics.get("diverged_tasks", [])
    if not named:
        return ""
    total = round(len(named) / metrics["diverged"])
    where = [_name(task) for task in named[:most]]
    rest = ["..."] if len(named) > most else []
    return f"outer step {metrics['step']}: {len(named)} of {total} tasks diverged: " + ", ".join(
        where + rest
    )


def _name(task: Mapping[str, Any]) -> str:
    text = f"task {task['task']}"
    if "family" in task:
        text += f" of family {task['family']}"
    if "inner_step" in task:
        text += f" at inner step {task['inner_step']}"
    if "drawn" in task:
        text += f" (drawn from {', '.join(map(str, task['drawn']))})"
    return text
