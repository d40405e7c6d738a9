"""Figures of few-shot learners: episodes with their predictions, accuracy against steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fmeta.fewshot._contract import MetaLearner
from fmeta.fewshot._evaluate import Scores
from fmeta.fewshot._source import Source, draw

__all__ = ["draw_adaptation", "draw_curves", "draw_episodes"]

_RIGHT, _WRONG = "#009E73", "#D55E00"


def draw_episodes(
    path: Path, learner: MetaLearner, meta_params: Any, source: Source, *, seed: int, rows: int = 4
) -> None:
    """Test episodes: a row each, support on the left, queries with what was predicted."""
    from matplotlib.figure import Figure

    from fmeta.plot._figure import INK, write

    episodes = draw(source, [(seed, i) for i in range(rows)], split="test")
    shown = min(10, episodes.query.x.shape[1])
    support = min(10, episodes.support.x.shape[1])
    figure = Figure(figsize=(0.75 * (support + shown + 1), 1.05 * rows + 0.7))
    grid = figure.subplots(rows, support + shown + 1)
    for i, axes in enumerate(grid):
        (xs, ys), (xq, yq) = (tuple(t[i] for t in e) for e in episodes[:2])
        with torch.no_grad():
            predicted = learner.predict(learner.adapt(meta_params, (xs, ys)), xq).argmax(-1)
        order = ys.argsort(stable=True)
        for axis in axes:
            axis.set_axis_off()
        for axis, k in zip(axes, order[:support].tolist(), strict=False):
            _image(axis, xs[k], str(int(ys[k])), INK)
        for axis, x, y, p in zip(axes[support + 1 :], xq, yq, predicted, strict=False):
            right = bool(y == p)
            text = f"{int(p)}" if right else f"{int(p)}, is {int(y)}"
            _image(axis, x, text, _RIGHT if right else _WRONG)
    figure.suptitle("support with labels | queries with predictions", fontsize=10)
    write(path, figure)


def _image(axis: Any, x: Any, text: str, color: str) -> None:
    image = x.permute(1, 2, 0) if x.ndim == 3 and len(x) == 3 else x.reshape(x.shape[-2:])
    axis.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title(text, color=color, fontsize=8, pad=2)


def draw_curves(
    path: Path,
    learner: MetaLearner,
    meta_params: Any,
    source: Source,
    *,
    seed: int,
    rows: int = 4,
    steps: Sequence[int | None] = (0, 1, None),
    beside: Mapping[str, tuple[MetaLearner, Any]] = MappingProxyType({}),
) -> None:
    """Test waves: the support points, and what is predicted after numbers of steps (None: all).

    Dashed, by name: what other learners predict, with meta-parameters of their own.
    """
    from matplotlib.figure import Figure

    from fmeta.plot._figure import INK, MUTED, PALETTE, write

    episodes = draw(source, [(seed, i) for i in range(rows)], split="test")
    figure = Figure(figsize=(3.4 * rows, 3.3), layout="constrained")
    x = torch.linspace(-5, 5, 201)[:, None]
    for i, axis in enumerate(figure.subplots(1, rows, sharey=True, squeeze=False)[0]):
        support = tuple(t[i] for t in episodes.support)
        known = [
            torch.cat([e.x[i] for e in episodes[:2]]),
            torch.cat([e.y[i] for e in episodes[:2]]),
        ]
        design = torch.cat([known[0].sin(), known[0].cos()], -1)
        wave = torch.cat([x.sin(), x.cos()], -1) @ torch.linalg.lstsq(design, known[1]).solution
        axis.plot(x.numpy(), wave.numpy(), color=INK, lw=1.2, label="the wave")
        for n in steps:
            with torch.no_grad():
                adapted = learner.adapt(meta_params, support, num_steps=n)
                y = learner.predict(adapted, x)
            label = "all steps" if n is None else f"{n} steps" if n != 1 else "1 step"
            if len(steps) == 1:
                label = "predicted"
            color = {0: MUTED, None: PALETTE[0]}.get(n, PALETTE[5])
            axis.plot(x.numpy(), y.numpy(), color=color, lw=1.6, label=label)
        for k, (name, (other, params)) in enumerate(beside.items()):
            with torch.no_grad():
                y = other.predict(other.adapt(params, support), x)
            axis.plot(x.numpy(), y.numpy(), "--", color=PALETTE[1 + k], lw=1.4, label=name)
        axis.plot(*(t.numpy() for t in support), "^", color=INK, ms=5, label="support")
        axis.spines[["top", "right"]].set_visible(False)
    _legend_below(figure, axis, columns=8)
    write(path, figure)


def draw_adaptation(
    path: Path,
    score: Callable[[int], Scores],
    steps: Mapping[int, bool],
    beside: Mapping[str, Scores],
    *,
    title: str,
    is_loss: bool,
) -> None:
    """Accuracy against adaptation steps, also beyond those of meta-training, beside baselines.

    All scores should be of the same episodes. Of a learner that takes no steps a line as well, the
    first of ``beside``.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from fmeta.plot._figure import PALETTE, log_scale, write

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()

    def value(scores: Scores) -> tuple[float, float]:
        return scores.loss() if is_loss else scores.accuracy()

    found = [value(score(n)) for n in steps]
    if found:
        means, halves = (torch.tensor(v) for v in zip(*found, strict=True))
        numbers = list(steps)
        axis.plot(numbers, means.numpy(), "o-", color=PALETTE[0], label="meta-trained")
        low, high = (means - halves).numpy(), (means + halves).numpy()
        axis.fill_between(numbers, low, high, color=PALETTE[0], alpha=0.2)
        trained = max((n for n, beyond in steps.items() if not beyond), default=0)
        axis.axvline(trained, color="0.5", lw=1, ls="--", label="steps of meta-training")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(-0.2, 1.25 * max(numbers))
        axis.set_xticks(numbers, map(str, numbers))
        axis.xaxis.set_minor_locator(NullLocator())
    for i, (name, scores) in enumerate(beside.items(), 1 if found else 0):
        mean, half = value(scores)
        axis.axhline(mean, color=PALETTE[i % len(PALETTE)], lw=1.4, label=name)
        if not found:
            axis.axhspan(mean - half, mean + half, color=PALETTE[i % len(PALETTE)], alpha=0.2, lw=0)
    axis.set(
        xlabel="adaptation steps" if found else "this learner takes no adaptation steps",
        ylabel=("mean squared error" if is_loss else "accuracy on queries") + " (band: 95 %)",
    )
    if not found:
        axis.set_xticks([])
    if is_loss:
        log_scale(axis, "y")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    _legend_below(figure, axis, columns=2)
    write(path, figure)


def _legend_below(figure: Any, axis: Any, *, columns: int) -> None:
    """A legend that covers nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
