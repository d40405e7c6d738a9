"""The configuration of the main job; command line, file and documentation come from it."""

from __future__ import annotations

import dataclasses

from fmeta import optimizers, trees
from fmeta.evaluate import BASELINES, get_baselines
from fmeta.meta_train._digits_tasks import digits_by_name
from fmeta.optimizer import Optimizer
from fmeta.tasks import TaskFamily

__all__ = ["TrainConfig"]

EVOLUTION = ("pes", "nres", "es_single", "es")
ESTIMATORS = (*EVOLUTION, "truncated", "full", "score_function")
WHOLE = ("full", "score_function")  # of whole trainings, which have one length


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Meta-trains a learned optimizer on scikit-learn's digits and shows how good it is."""

    rule: str = "basis_mlp"
    """Learned rule, a name that `fmeta optimizers` lists."""
    out: str = "runs"
    """Folder in which the run's own folder is made."""
    name: str = "digits"
    """Name of the run: everything is written to OUT/NAME."""
    seed: int = 0
    """Seed of all randomness."""
    tasks: tuple[str, ...] = ("mlp:32", "mlp:24,24:tanh", "autoencoder:24")
    """Models to learn on, each model:widths or model:widths:activation."""
    batch_size: int = 128
    """Images in an inner batch."""
    online: bool = True
    """Shift, rotate and noise every batch afresh, so that training loss tells generalisation."""
    estimator: str = "pes"
    """Meta-gradient: pes, nres, es_single, es, truncated (backprop), full or score_function."""
    num_tasks: int = 33
    """Trainings that one meta-gradient averages over (perturbed ones: pairs of them)."""
    horizons: tuple[int, ...] = (50, 100, 200)
    """Inner steps of a training; each gets one of these (full, score_function: the longest)."""
    truncation: int = 20
    """Inner steps between two outer steps (not for full and score_function)."""
    std: float = 0.03
    """Standard deviation: pes, nres, es_single, es of the weights; score_function of a step."""
    num_steps: int = 220
    """Outer steps."""
    outer_lr: float = 4e-3
    """Learning rate of Adam outside at its start; it falls to a twentieth, along a cosine."""
    max_grad_norm: float = 1.0
    """Meta-gradients with a larger norm are scaled down to it."""
    averaging: float | None = 0.5
    """Average the weights over the outer steps after this fraction of them; None: do not."""
    validation_task: str = "mlp:40"
    """Model on which meta-validation trains, with seeds of its own."""
    validation_seeds: int = 16
    """Trainings of a validation, each of the longest horizon; always the same ones."""
    validate_every: int = 44
    """Outer steps between validations; the best weights are kept."""
    patience: int | None = 4
    """Stop after this many validations without a new best; None: never."""
    max_skipped: int = 10
    """Outer steps in a row of which all tasks diverge, after which the run gives up."""
    save_every: int = 10
    """Outer steps between checkpoints."""
    eval_task: str = "mlp:48"
    """Model of the final comparison; the default is of a width that was not met before."""
    eval_lengths: tuple[int, ...] = (1, 5, 10)
    """Inner steps of the final comparison, in multiples of the longest horizon."""
    eval_seeds: int = 16
    """Fresh initialisations in the final comparison (half as many for longer trainings)."""
    baselines: tuple[str, ...] = tuple(BASELINES)
    """Hand-made optimizers to tune and beat; longer trainings have adam, and two with a cosine."""
    compile: bool = False
    """Compile the inner step (pieces only): twice as fast, after a minute or so for each task."""
    tensorboard: bool = False
    """Also write event files to OUT/NAME/tensorboard (needs the extra fmeta[tensorboard])."""
    beside: bool = True
    """Tune the baselines beside meta-training, in a process of its own (on a second core)."""
    resume: bool = False
    """Go on with the run in OUT/NAME where it was stopped, or killed."""
    smoke: bool = False
    """A few seconds instead of minutes: proves that everything runs, the result is no good."""

    def checked(self) -> TrainConfig:
        """This configuration, shrunk for ``smoke``, or a ValueError that names what is wrong."""
        self.build_rule()
        if self.estimator not in ESTIMATORS:
            raise ValueError(
                f"estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}"
            )
        self._check_numbers()
        if not self.tasks:
            raise ValueError("tasks is empty: name at least one, like mlp:32")
        for name in (*self.tasks, self.validation_task, self.eval_task):
            self.family(name)
        if self.num_tasks < len(self.tasks):
            raise ValueError(
                f"num_tasks must be at least the number of tasks, got {self.num_tasks} for "
                f"{len(self.tasks)} kinds"
            )
        if self.compile and self.estimator in WHOLE:
            names = ", ".join(name for name in ESTIMATORS if name not in WHOLE)
            raise ValueError(f"compile goes with the estimators {names}, not with {self.estimator}")
        get_baselines(self.baselines)
        if not self.name or "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"name must be the name of a folder, got {self.name!r}")
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            tasks=self.tasks[:1],
            num_tasks=2,
            horizons=(8,),
            truncation=4,
            num_steps=4,
            validate_every=2,
            validation_seeds=2,
            eval_lengths=(1, 2),
            eval_seeds=3,
            baselines=self.baselines[:1],
            beside=False,
        )

    def _check_numbers(self) -> None:
        for field in (
            "batch_size",
            "num_tasks",
            "truncation",
            "num_steps",
            "validation_seeds",
            "validate_every",
            "max_skipped",
            "save_every",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("horizons", "eval_lengths"):
            values = getattr(self, field)
            if not values or min(values) < 1:
                raise ValueError(f"{field} must be numbers of at least 1, got {values}")
        if len(set(self.eval_lengths)) < len(self.eval_lengths):
            raise ValueError(f"eval_lengths must differ from each other, got {self.eval_lengths}")
        if self.eval_seeds < 2:
            raise ValueError(
                f"eval_seeds must be at least 2 (for an interval), got {self.eval_seeds}"
            )
        for field in ("std", "outer_lr", "max_grad_norm"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 or None, got {self.patience}")
        if self.averaging is not None and not 0 <= self.averaging < 1:
            raise ValueError(f"averaging must be in [0, 1) or None, got {self.averaging}")

    def build_rule(self) -> Optimizer:
        """The rule with its default arguments, or a ValueError when it has nothing to learn."""
        builder = optimizers.get(self.rule)
        try:
            rule = builder()
        except TypeError as error:
            raise ValueError(
                f"rule {self.rule!r} needs arguments ({error}): choose another"
            ) from None
        if not trees.leaves(rule.init()):
            raise ValueError(f"{self.rule} has nothing to learn: choose a learned rule")
        return rule

    def family(self, task: str) -> TaskFamily:
        """The family of that name, or a ValueError."""
        return digits_by_name(task, batch_size=self.batch_size, online=self.online)
