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
from fmeta.tasks._mixture import Mixture, mixture

__all__ = [
    "Mixture",
    "Task",
    "TaskFamily",
    "digits",
    "loss_of_task",
    "mixture",
    "sample_batches",
    "sample_task",
    "stack_tasks",
]
