"""Families of tasks to meta-train on."""

from fmeta.tasks._augmented import augmented
from fmeta.tasks._digits import digits
from fmeta.tasks._family import (
    Task,
    TaskFamily,
    extras_of_task,
    loss_of_task,
    sample_batches,
    sample_task,
    stack_tasks,
)
from fmeta.tasks._mixture import Mixture, mixture
from fmeta.tasks._quadratic import (
    quadratic,
    quadratic_losses,
    quadratic_meta_gradient,
    quadratic_optimum,
)
from fmeta.tasks._sinusoid import sinusoid

__all__ = [
    "Mixture",
    "Task",
    "TaskFamily",
    "augmented",
    "digits",
    "extras_of_task",
    "loss_of_task",
    "mixture",
    "quadratic",
    "quadratic_losses",
    "quadratic_meta_gradient",
    "quadratic_optimum",
    "sample_batches",
    "sample_task",
    "sinusoid",
    "stack_tasks",
]
