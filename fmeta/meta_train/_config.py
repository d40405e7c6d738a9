"""The configuration of the main job; command line, file and documentation come from it."""

from __future__ import annotations

import dataclasses
from typing import Any

from fmeta import optimizers, trees
from fmeta.optimizer import Optimizer

__all__ = ["TrainConfig"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Meta-trains a learned optimizer on scikit-learn's digits and shows how good it is."""

    rule: str = "linear"
    """Learned rule, a name that `fmeta optimizers` lists."""
    out: str = "runs"
    """Folder in which the run's own folder is made."""
    name: str = "digits"
    """Name of the run: everything is written to OUT/NAME."""
    seed: int = 0
    """Seed of all randomness."""
    num_steps: int = 60
    """Outer steps."""
    num_tasks: int = 4
    """Tasks that one meta-gradient averages over."""
    horizon: int = 100
    """Inner steps of one task in meta-training."""
    eval_steps: int = 100
    """Inner steps of the final comparison (by default as many as the horizon)."""
    eval_seeds: int = 10
    """Fresh initialisations in the final comparison."""
    width: int = 32
    """Hidden width of the classifiers 64-WIDTH-10."""
    batch_size: int = 64
    """Images in an inner batch."""
    outer_lr: float = 3e-2
    """Learning rate of Adam outside."""
    max_grad_norm: float = 1.0
    """Meta-gradients with a larger norm are scaled down to it."""
    first_order: str = "none"
    """none (second order), or constants for the rule: its gradients, or all its inputs."""
    checkpoint: str = "sqrt"
    """Memory of the unroll: none, sqrt or a number of snapshots."""
    validate_every: int = 10
    """Outer steps between validations on tasks of their own."""
    patience: int | None = 5
    """Stop after this many validations without a new best; None: never."""
    averaging: float | None = None
    """Average the weights over the outer steps after this fraction of them; None: do not."""
    max_skipped: int = 10
    """Outer steps in a row of which all tasks diverge, after which the run gives up."""
    save_every: int = 10
    """Outer steps between checkpoints."""
    tensorboard: bool = False
    """Also write event files to OUT/NAME/tensorboard (needs the extra fmeta[tensorboard])."""
    threads: int = 1
    """Threads of torch; on these small models two take as long as one, and more CPU time."""
    resume: bool = False
    """Go on with the run in OUT/NAME where it was stopped, or killed."""
    smoke: bool = False
    """A few seconds instead of a minute: proves that everything runs, the result is no good."""

    def checked(self) -> TrainConfig:
        """This configuration, shrunk for ``smoke``, or a ValueError that names what is wrong."""
        self.build_rule()
        for field in (
            "num_steps",
            "num_tasks",
            "horizon",
            "eval_steps",
            "width",
            "batch_size",
            "threads",
            "validate_every",
            "max_skipped",
            "save_every",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.eval_seeds < 2:
            raise ValueError(
                f"eval_seeds must be at least 2 (for an interval), got {self.eval_seeds}"
            )
        for field in ("outer_lr", "max_grad_norm"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 or None, got {self.patience}")
        if self.averaging is not None and not 0 <= self.averaging < 1:
            raise ValueError(f"averaging must be in [0, 1) or None, got {self.averaging}")
        if not self.name or "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"name must be the name of a folder, got {self.name!r}")
        self.unroll_options()
        if not self.smoke:
            return self
        return dataclasses.replace(
            self, num_steps=4, num_tasks=2, horizon=8, eval_steps=16, eval_seeds=3, validate_every=2
        )

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

    def unroll_options(self) -> dict[str, Any]:
        """``first_order`` and ``checkpoint`` as `fmeta.unroll` takes them."""
        orders = {"none": False, "gradients": "gradients", "inputs": "inputs"}
        if self.first_order not in orders:
            raise ValueError(
                f"first_order must be one of {', '.join(orders)}, got {self.first_order!r}"
            )
        checkpoint: str | int | None = self.checkpoint
        if self.checkpoint == "none":
            checkpoint = None
        elif self.checkpoint.isdecimal() and int(self.checkpoint) > 0:
            checkpoint = int(self.checkpoint)
        elif self.checkpoint != "sqrt":
            raise ValueError(
                f"checkpoint must be none, sqrt or a number of snapshots, got {self.checkpoint!r}"
            )
        return {"first_order": orders[self.first_order], "checkpoint": checkpoint}
