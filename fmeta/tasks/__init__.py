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
from fmeta.tasks._logistic_regression import logistic_regression
from fmeta.tasks._mixture import Mixture, mixture
from fmeta.tasks._quadratic import (
    quadratic,
    quadratic_losses,
    quadratic_meta_gradient,
    quadratic_optimum,
)
from fmeta.tasks._robust_regression import robust_regression
from fmeta.tasks._sinusoid import sinusoid
from fmeta.tasks._small_net import small_net

__all__ = [
    "Mixture",
    "Task",
    "TaskFamily",
    "augmented",
    "digits",
    "extras_of_task",
    "logistic_regression",
    "loss_of_task",
    "mixture",
    "quadratic",
    "quadratic_losses",
    "quadratic_meta_gradient",
    "quadratic_optimum",
    "robust_regression",
    "sample_batches",
    "sample_task",
    "sinusoid",
    "small_net",
    "stack_tasks",
]
