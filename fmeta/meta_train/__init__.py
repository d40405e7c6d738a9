"""Meta-training: the outer loop, jobs that survive faults, and the main job on real digits."""

from fmeta.meta_train._config import TrainConfig
from fmeta.meta_train._digits_job import train_on_digits
from fmeta.meta_train._diverged import describe as describe_diverged
from fmeta.meta_train._job import Recipe, run_job
from fmeta.meta_train._loop import Result, resume, run
from fmeta.meta_train._options import options_table, read_config

__all__ = [
    "Recipe",
    "Result",
    "TrainConfig",
    "describe_diverged",
    "options_table",
    "read_config",
    "resume",
    "run",
    "run_job",
    "train_on_digits",
]
