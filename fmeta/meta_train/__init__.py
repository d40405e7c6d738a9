"""Meta-training: the outer loop, and the main job on real digits."""

from fmeta.meta_train._config import TrainConfig
from fmeta.meta_train._digits_job import train_on_digits
from fmeta.meta_train._loop import Result, resume, run

__all__ = ["Result", "TrainConfig", "resume", "run", "train_on_digits"]
