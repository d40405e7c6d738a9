"""The configuration of the few-shot job; the command line comes from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fmeta.fewshot._anil import anil
from fmeta.fewshot._baselines import fine_tune
from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._conv4 import conv4
from fmeta.fewshot._glyphs import glyphs
from fmeta.fewshot._image_folder import image_folder, omniglot
from fmeta.fewshot._imaml import imaml
from fmeta.fewshot._llama import llama
from fmeta.fewshot._maml import first_order_maml, maml
from fmeta.fewshot._maml_plus_plus import maml_plus_plus
from fmeta.fewshot._meta_lstm import meta_lstm
from fmeta.fewshot._meta_sgd import meta_sgd
from fmeta.fewshot._model import check_batch_norm
from fmeta.fewshot._protonet import protonet
from fmeta.fewshot._reptile import reptile
from fmeta.fewshot._sinusoid import sinusoid
from fmeta.fewshot._snail import snail
from fmeta.fewshot._source import Source
from fmeta.tasks._mlp import mlp

__all__ = ["LEARNERS", "TASKS", "FewShotConfig"]

LEARNERS: dict[str, Any] = {
    "maml": maml,
    "first_order_maml": first_order_maml,
    "anil": anil,
    "meta_sgd": meta_sgd,
    "reptile": reptile,
    "maml_plus_plus": maml_plus_plus,
    "imaml": imaml,
    "llama": llama,
    "meta_lstm": meta_lstm,
    "snail": snail,
    "protonet": protonet,
    "fine_tune": fine_tune,
}
# Learners that judge by features and not by a last layer of the network.
OF_FEATURES = ("snail", "protonet", "fine_tune")
OF_CLASSES = ("protonet", "fine_tune")
WITHOUT_STEPS = ("snail", "protonet")
TASKS = ("glyphs", "sinusoid", "omniglot", "image_folder")
# Options that not every task has a use for, and the tasks that do.
_USED_BY = {
    "ways": ("glyphs", "omniglot", "image_folder"),
    "root": ("glyphs", "omniglot", "image_folder"),
    "channels": ("glyphs", "omniglot", "image_folder"),
    "batch_norm": ("glyphs", "omniglot", "image_folder"),
    "download": ("omniglot",),
    "color": ("image_folder",),
}
# Shots and queries where none are given: of a class, and of an episode of sinusoid.
_OF_A_CLASS, _OF_A_WAVE = {"shots": 1, "queries": 5}, {"shots": 10, "queries": 10}
# Of snail, half the paper's sizes: here they take half the time.
_HALF: dict[str, Any] = {"filters": 64, "attends": ((64, 32), (128, 64), (256, 128))}


@dataclasses.dataclass(frozen=True)
class FewShotConfig:
    """Meta-trains a few-shot learner and tests it on 1,000 episodes of classes it never saw."""

    learner: str = "maml"
    """maml, first_order_maml, anil, meta_sgd, reptile, maml_plus_plus, imaml, llama, meta_lstm,
    snail, protonet or fine_tune."""
    task: str = "glyphs"
    """glyphs (letters of matplotlib's fonts), sinusoid, omniglot or image_folder."""
    ways: int = 5
    """Classes of an episode."""
    shots: int | None = None
    """Support examples of a class (sinusoid: of an episode); None: 1, of sinusoid 10."""
    queries: int | None = None
    """Query examples of a class in meta-training (sinusoid: of an episode); None: 5, of sinusoid
    10."""
    root: str | None = None
    """Folder of the data. image_folder: holds SPLIT/CLASS/IMAGE with splits train, validation,
    test; images are made 28 x 28. omniglot: holds omniglot-py; None: data. glyphs: of the cache."""
    download: bool = False
    """Omniglot: get what is missing in ROOT, by torchvision."""
    color: bool = False
    """Colours of image_folder are kept; else its images are made grey."""
    out: str = "runs"
    """Folder in which the run's own folder is made."""
    name: str = "fewshot"
    """Name of the run: everything is written to OUT/NAME."""
    seed: int = 0
    """Seed of all randomness."""
    channels: int = 32
    """Filters of each of the four convolutions; the net of sinusoid has layers of 40 units."""
    batch_norm: str = "transductive"
    """What a network normalises by on query examples: transductive (all of them) or support."""
    num_steps: int | None = None
    """Inner steps; None: the learner's own number."""
    inner_lr: float | None = None
    """Rate of the inner steps, at their start; None: 0.1, of sinusoid 0.01, of fine_tune 0.5."""
    num_tasks: int = 8
    """Episodes in a meta-batch."""
    outer_steps: int = 400
    """Outer steps; with maml on glyphs one takes about 0.8 seconds of a core, so five minutes."""
    outer_lr: float = 2e-3
    """Learning rate of Adam outside at its start; it falls to a hundredth, along a cosine."""
    max_grad_norm: float = 10.0
    """Meta-gradients with a larger norm are scaled down to it."""
    validate_every: int = 100
    """Outer steps between validations; the best meta-parameters are kept."""
    validation_episodes: int = 100
    """Episodes of a validation, always the same ones, of classes of their own."""
    patience: int | None = 5
    """Stop after this many validations without a new best; None: never."""
    save_every: int = 50
    """Outer steps between checkpoints."""
    test_episodes: int = 1000
    """Episodes of the final table."""
    baselines: bool = True
    """Put the untrained start, training from scratch and nearest neighbours into that table too."""
    resume: bool = False
    """Go on with the run in OUT/NAME where it was stopped, or killed."""
    smoke: bool = False
    """A few seconds instead of minutes, by numbers that are made small: proves that everything
    runs, the result is no good."""

    def checked(self) -> FewShotConfig:
        """This configuration with the task's own numbers, shrunk for ``smoke``.

        Raises:
            ValueError: with the name of what is wrong.
        """
        if self.learner not in LEARNERS:
            raise ValueError(f"unknown learner {self.learner!r}: there are {', '.join(LEARNERS)}")
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}: there are {', '.join(TASKS)}")
        if self.task == "image_folder" and self.root is None:
            raise ValueError("image_folder needs --root, the folder that holds train/, test/, ...")
        if self.task == "sinusoid" and self.learner in OF_CLASSES:
            raise ValueError(f"{self.learner} classifies: sinusoid is a regression, take maml")
        for field, tasks in _USED_BY.items():
            if self.task not in tasks and getattr(self, field) != getattr(FewShotConfig, field):
                raise ValueError(f"{self.task} has no use for {field}: leave it out")
        for field in ("num_steps", "inner_lr"):
            if self.learner in WITHOUT_STEPS and getattr(self, field) is not None:
                raise ValueError(f"{self.learner} takes no inner steps: leave out {field}")
        if self.learner == "meta_lstm" and self.inner_lr is not None:
            raise ValueError("meta_lstm learns how far it goes: leave out inner_lr")
        if self.ways < 2:
            raise ValueError(f"ways must be at least 2, got {self.ways}: classes are told apart")
        for field in (
            "channels",
            "num_tasks",
            "outer_steps",
            "validate_every",
            "validation_episodes",
            "save_every",
            "test_episodes",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("shots", "queries", "num_steps", "patience"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("outer_lr", "max_grad_norm", "inner_lr"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} must be positive and finite, got {value}")
        check_batch_norm(self.batch_norm)
        if not self.name or "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"name must be the name of a folder, got {self.name!r}")
        numbers = self._examples()
        if self.smoke:
            most = {
                "num_tasks": 2,
                "outer_steps": 4,
                "validate_every": 2,
                "validation_episodes": 4,
                "test_episodes": 10,
            }
            if self.task != "sinusoid":
                most["channels"] = 4
            numbers |= {field: min(getattr(self, field), n) for field, n in most.items()}
        return dataclasses.replace(self, **numbers)

    def _examples(self) -> dict[str, Any]:
        """``shots`` and ``queries``."""
        own = _OF_A_WAVE if self.task == "sinusoid" else _OF_A_CLASS
        given = {field: getattr(self, field) for field in own}
        return {field: own[field] if n is None else n for field, n in given.items()}

    def source(self, *, test: bool = False, progress: bool = True) -> Source:
        """Episodes; those of the test have 15 queries of a class, or as many as there are."""
        shots, queries = self._examples().values()
        if self.task == "sinusoid":
            return sinusoid(shots, queries)
        options: dict[str, Any] = {"ways": self.ways, "shots": shots, "queries": queries}
        if self.task == "image_folder":
            assert self.root is not None
            return image_folder(self.root, **options, color=self.color)
        if test and shots < 20:
            options["queries"] = min(15, 20 - shots)
        if self.task == "glyphs":
            return glyphs(**options, root=self.root, progress=progress)
        return omniglot(
            "data" if self.root is None else self.root, **options, download=self.download
        )

    def build(self, source: Source) -> MetaLearner:
        """The learner."""
        builder = LEARNERS[self.learner]
        options: dict[str, Any] = {"batch_norm": self.batch_norm}
        if self.num_steps is not None:
            options["num_steps"] = self.num_steps
        if self.learner == "snail":
            outputs = source.ways or 1
            return snail(
                self.network(source) if source.ways else None,
                outputs,
                outputs * source.shots,
                num_features=None if source.ways else 1,
                loss=self.loss,
                **_HALF,
                **options,
            )
        if self.learner == "protonet":
            return protonet(self.network(source), self.ways, **options)
        if self.learner == "fine_tune":
            if self.inner_lr is not None:
                options["lr"] = self.inner_lr
            return fine_tune(self.network(source), self.ways, source.classes["train"], **options)
        rate = 0.01 if self.task == "sinusoid" else 0.1
        if self.learner != "meta_lstm":
            options["lr"] = rate if self.inner_lr is None else self.inner_lr
        if self.learner == "reptile":  # as in the paper: steps on different batches of a task
            options["batch_size"] = 10
        found: MetaLearner = builder(self.network(source), loss=self.loss, **options)
        return found

    @property
    def loss(self) -> str:
        return "mse" if self.task == "sinusoid" else "cross_entropy"

    def network(self, source: Source, *, head: bool = False) -> Any:
        """What the learner trains; with ``head`` a classifier in any case."""
        features = self.learner in OF_FEATURES and not head
        if self.task == "sinusoid":
            return mlp((1, 40, 40, 1), "relu")
        shape = source.shape
        return conv4(
            None if features else self.ways,
            side=shape[-1],
            in_channels=shape[0],
            channels=self.channels,
        )
