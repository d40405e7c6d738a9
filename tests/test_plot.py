"""Figures: everything drawn is named, axes are logarithmic, files are whole."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from fmeta import evaluate, optimizers, plot
from fmeta.plot import _evaluation, _figure, _meta_training
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily


@pytest.fixture(scope="module")
def evaluation():
    """Two contenders, of which one diverges, and four baselines."""
    family = TaskFamily(
        torch.tensor(1.0),
        lambda generator: {},
        lambda config, generator: {"w": torch.randn(3, generator=generator)},
        lambda config, generator, steps, split="train": torch.randn(steps, 3, generator=generator),
        lambda data, config, p, b: (p["w"] - b).square().sum(),
    )
    mine = {"mine": (optimizers.sgd(0.1), {}), "wild": (optimizers.sgd(1e30), {})}
    names = ("adam", "adam_cosine", "sgd", "muon")
    return evaluate.run(
        family,
        mine,
        num_steps=30,
        num_seeds=3,
        seed=0,
        baselines=names,
        rates={"adam": 0.05, "adam_cosine": 0.2, "sgd": 0.001, "muon": 0.001},
    )


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, writes, and gives the figure."""

    def draw(module, fn, *args, **options):
        figures = []
        write = module.write
        with monkeypatch.context() as patch:
            patch.setattr(module, "write", lambda p, f: (figures.append(f), write(p, f)))
            fn(tmp_path / "figure.png", *args, **options)
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
        return figures[0]

    return draw


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


@pytest.mark.parametrize(("low", "high"), [(2.1, 4.9), (1.1, 1.4), (0.3, 7.0), (1e-5, 3e4)])
def test_a_log_axis_has_numbers_whatever_its_range(low, high):
    axis = Figure().subplots()
    axis.set_ylim(low, high)
    _figure.log_scale(axis, "y")
    axis.set_ylim(low, high)
    seen = [t for t in axis.get_yticks() if low <= t <= high]
    assert 2 <= len(seen) <= 10
    assert [axis.yaxis.get_major_formatter()(t) for t in seen] == [f"{t:g}" for t in seen]


def test_a_figure_is_drawn_of_curves_that_diverge_too(tmp_path):
    good = 2.0 - torch.rand(3, 20, generator=fold_in(2))
    bad = good.clone()
    bad[0, 10:] = math.nan
    path = tmp_path / "curves.png"
    panels = {"training": {"good": good, "bad": bad}, "held out": {"good": good}}
    plot.curves(path, panels, title="losses", mark=(10, "horizon"))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_contenders_the_reference_and_the_best_baseline_are_named(drawn, evaluation):
    found = {"30 steps": evaluation}
    figure = drawn(_evaluation, plot.evaluations, found, title="a title")
    best = min(
        ("adam_cosine", "sgd", "muon"),
        key=lambda k: float(evaluation.outcomes[k].held_out_loss.mean()),
    )
    assert legend(figure) == [
        "mine",
        "wild",
        "Adam, tuned",
        f"{evaluation.outcomes[best].label}, tuned",
        "other tuned baselines",
    ]
    assert titles(figure) == ["30 steps: training", "30 steps: held out"]
    assert "a title" in figure.get_suptitle()
    assert "mean of 3 seeds" in figure.get_suptitle()
    for axis in figure.axes:
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert len(axis.lines) == len(evaluation.outcomes)


def test_further_evaluations_have_a_panel_each(drawn, evaluation):
    found = {"once": evaluation, "5 times": evaluation, "10 times": evaluation}
    figure = drawn(_evaluation, plot.evaluations, found, title="x")
    assert titles(figure) == ["once: training", *(f"{name}: held out" for name in found)]
    figure = drawn(_evaluation, plot.evaluations, found, title="x", training=False)
    assert titles(figure) == [f"{name}: held out" for name in found]


def test_a_mark_beyond_the_last_step_is_left_out(drawn, evaluation):
    counts = []
    for step in (10, 100):
        figure = drawn(
            _evaluation, plot.evaluations, {"a": evaluation}, title="x", mark=(step, "horizon")
        )
        counts.append([len(axis.texts) for axis in figure.axes])
    assert counts == [[1, 1], [0, 0]]


def test_the_same_evaluation_gives_the_same_bytes(tmp_path, evaluation):
    for name in ("a.png", "b.png"):
        plot.evaluations(tmp_path / name, {"a": evaluation}, title="x")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def rows(count, **more):
    noise = torch.rand(count, generator=fold_in(0)).tolist()
    return [
        {"step": i, "meta_loss": 1 + x, "meta_grad_norm": x, **more} for i, x in enumerate(noise)
    ]


def test_meta_training_shows_what_was_recorded(drawn):
    run = rows(60, diverged=0.25)
    run[10]["validation"] = run[50]["validation"] = 1.5
    run[20]["meta_loss"] = math.nan
    figure = drawn(_meta_training, plot.meta_training, {"run": run}, title="x")
    assert titles(figure) == ["meta-loss", "norm of the meta-gradient", "share of diverged tasks"]
    assert legend(figure) == ["training tasks (mean of the steps around)", "validation tasks"]
    validation = figure.axes[0].lines[-1]
    assert validation.get_xdata().tolist() == [11, 51]
    figure = drawn(_meta_training, plot.meta_training, {"run": rows(3)}, title="x")
    assert titles(figure) == ["meta-loss", "norm of the meta-gradient"]


def test_several_courses_of_meta_training_are_named(drawn):
    figure = drawn(_meta_training, plot.meta_training, {"a": rows(50), "b": rows(9)}, title="x")
    assert legend(figure) == ["a", "b"]


def test_a_meta_loss_below_zero_is_not_on_a_log_axis(drawn):
    run = [{"step": i, "meta_loss": -1.0, "meta_grad_norm": 1.0} for i in range(3)]
    figure = drawn(_meta_training, plot.meta_training, {"run": run}, title="x")
    assert [axis.get_yscale() for axis in figure.axes] == ["linear", "log"]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there are no evaluations to draw"):
        plot.evaluations(tmp_path / "a.png", {}, title="x")
    with pytest.raises(ValueError, match="no metrics to draw: the run has made no outer step"):
        plot.meta_training(tmp_path / "a.png", {"run": []}, title="x")
    assert list(tmp_path.iterdir()) == []
