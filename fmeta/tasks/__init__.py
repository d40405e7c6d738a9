"""Families of tasks to meta-train on."""

from fmeta.tasks._digits import digits
from fmeta.tasks._family import (
    Task,
    TaskFamily,
    loss_of_task,
    sample_batches,
    sample_task,
    stack_tasks,
)

__all__ = [
    "Task",
    "TaskFamily",
    "digits",
    "loss_of_task",
    "sample_batches",
    "sample_task",
    "stack_tasks",
]
