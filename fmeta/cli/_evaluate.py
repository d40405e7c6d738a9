"""``fmeta evaluate``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fmeta import _files, evaluate, plot, pretrained, trees
from fmeta.meta_train._lock import locked
from fmeta.optimizer import Optimizer
from fmeta.tasks import TaskFamily, digits

__all__ = ["EvaluateConfig", "run_evaluate"]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Trains fresh models with a learned optimizer, its untrained start and tuned baselines.

    All start from the same parameters and see the same batches, on images and seeds that
    meta-training did not see. Each baseline's learning rate is first tuned on validation images,
    for as many steps. Prints a table and writes OUT/results.json and OUT/curves.png.
    """

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN-OR-WEIGHTS")]
    """Folder of a run, or a .safetensors file of weights."""
    model: str = "mlp"
    """What is trained on the digits: mlp, cnn, autoencoder or transformer."""
    widths: tuple[int, ...] = (48,)
    """Hidden widths of the model (cnn: channels; transformer: one even width a block)."""
    activation: str = "relu"
    """Activation of the model: relu, tanh or gelu."""
    batch_size: int = 128
    """Images in a batch."""
    online: bool = True
    """Shift, rotate and noise every batch afresh."""
    num_steps: tuple[int, ...] = (200,)
    """Training steps; several numbers make an evaluation each, baselines tuned anew."""
    num_seeds: int = 10
    """Models that each optimizer trains; the intervals are over them."""
    seed: int = 2_000_003
    """Of the initial parameters and batches; take one that meta-training did not see."""
    baselines: tuple[str, ...] = tuple(evaluate.BASELINES)
    """Hand-made optimizers to tune and compare with; steps are counted to the loss of adam."""
    tune_seeds: int = 3
    """Models that each learning rate is tried on."""
    chunk_size: int | None = None
    """Models trained at once; fewer take less memory. None: all."""
    out: str | None = None
    """Folder for results.json and curves.png; None: evaluation-MODEL-WIDTHS beside the weights."""
    overwrite: bool = False
    """Replace the results of an earlier evaluation in that folder."""
    threads: int = 1
    """Threads of torch; small models are no faster with two."""

    def checked(self) -> EvaluateConfig:
        """This configuration, or a ValueError that names what is wrong."""
        least = {"num_seeds": 2, "tune_seeds": 1, "threads": 1, "chunk_size": 1}
        for field, bound in least.items():
            value = getattr(self, field)
            if value is not None and value < bound:
                raise ValueError(f"{field} must be at least {bound}, got {value}")
        if not self.num_steps or min(self.num_steps) < 1:
            given = ", ".join(map(str, self.num_steps)) or "none"
            raise ValueError(f"num_steps must be at least 1, got {given}")
        evaluate.get_baselines(self.baselines)
        return self

    def family(self) -> TaskFamily:
        """The tasks to train on."""
        return digits(self.widths, self.activation, self.batch_size, self.model, self.online)

    def folder(self) -> Path:
        """Where the results go."""
        if self.out is not None:
            return Path(self.out)
        name = "-".join(("evaluation", self.model, *map(str, self.widths)))
        return _weights_file(self.weights).parent / name


def run_evaluate(config: EvaluateConfig) -> int:
    """Evaluates, prints and writes; gives the exit status."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(100, console.width))  # a table that goes to a file
    config = config.checked()
    torch.set_num_threads(config.threads)
    family = config.family()
    contenders = _contenders(config.weights)
    folder = config.folder()
    if (folder / "config.json").exists():
        raise FileExistsError(
            f"{folder} is the folder of a run, which has results of its own: choose another --out"
        )
    if (folder / "results.json").exists() and not config.overwrite:
        raise FileExistsError(
            f"{folder} holds results already: choose another --out, or add --overwrite"
        )
    title = _title(config)
    mark = _mark(_run_config(_weights_file(config.weights)))
    evaluations: dict[str, evaluate.Evaluation] = {}
    with locked(_files.writable_folder(folder)):
        for steps in config.num_steps:
            evaluations[f"{steps} steps"] = evaluate.run(
                family,
                contenders,
                num_steps=steps,
                num_seeds=config.num_seeds,
                seed=config.seed,
                baselines=config.baselines,
                tune_seeds=config.tune_seeds,
                chunk_size=config.chunk_size,
                on_phase=lambda text: console.print(text, highlight=False, markup=False),
            )
            # After each: who stops a later one keeps those before it.
            evaluate.Results(evaluations, title, mark).save(folder / "results.json")
            plot.evaluations(folder / "curves.png", evaluations, title=title, mark=mark)
    for name, found in evaluations.items():
        console.print(found.table(f"{title}, {name}"))
    console.print(f"written: {folder}/results.json, {folder}/curves.png", soft_wrap=True)
    return 0


def _title(config: EvaluateConfig) -> str:
    widths = "-".join(map(str, config.widths))
    images = "freshly transformed digits" if config.online else "digits"
    return f"{config.model} of width {widths} on {images}"


def _weights_file(path: str) -> Path:
    """The file itself, or the one in a run's folder."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not Path(path).is_dir():
        return Path(path)
    file = Path(path) / "weights.safetensors"
    if not file.exists():
        raise FileNotFoundError(
            f"the folder {path} holds no weights.safetensors: is the run finished, and is it one?"
        )
    return file


def _contenders(path: str) -> dict[str, tuple[Optimizer, Any]]:
    """The learned rule, and where its meta-training began."""
    file = _weights_file(path)
    rule, opt_params = pretrained.load(file)
    found = {"learned rule": (rule, opt_params)}
    if trees.leaves(opt_params):
        start = rule.init(torch.Generator().manual_seed(_seed(_run_config(file))))
        found["untrained start"] = (rule, start)
    return found


def _seed(config: dict[str, Any]) -> int:
    """The seed that the start of a run was drawn from; 0 for weights without a run."""
    seed = config.get("seed")
    return seed if isinstance(seed, int) else 0


def _mark(config: dict[str, Any]) -> tuple[int, str] | None:
    """The longest horizon of meta-training, to mark in the figure."""
    horizons = config.get("horizons")
    if not isinstance(horizons, list) or not horizons:
        return None
    if not all(isinstance(horizon, int) for horizon in horizons):
        return None
    return max(horizons), "longest of meta-training"


def _run_config(file: Path) -> dict[str, Any]:
    """The configuration beside the weights; empty for weights without a run."""
    try:
        config = json.loads((file.parent / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
