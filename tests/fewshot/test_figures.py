"""Figures of few-shot learners: nothing is covered or cut, and what is compared is comparable."""

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import fmeta.fewshot._job as job
from fmeta import fewshot
from fmeta.fewshot import _figures
from fmeta.random import fold_in


def scores(i, episodes=6):
    values = 0.3 + torch.rand(2, episodes, generator=fold_in(i))
    return fewshot.Scores(*values)


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draws, and gives the figure, laid out."""

    def draw(function, *args, **options):
        found = []
        monkeypatch.setattr("fmeta.plot._figure.write", lambda path, figure: found.append(figure))
        function(tmp_path / "figure.png", *args, **options)
        FigureCanvasAgg(found[0]).draw()
        return found[0]

    return draw


def covered(figure):
    legend = figure.legends[0].get_window_extent()
    return [axis for axis in figure.axes if legend.overlaps(axis.get_tightbbox())]


@pytest.mark.parametrize("is_loss", [False, True])
def test_the_curve_of_adaptation_is_seen_whole(figure, is_loss):
    steps = {0: False, 1: False, 5: False, 10: True, 40: True}
    beside = {name: scores(i) for i, name in enumerate(("maml, untrained", "from scratch"))}
    drawn = figure(
        _figures.draw_adaptation, scores, steps, beside, title="maml on points", is_loss=is_loss
    )
    (axis,) = drawn.axes
    assert axis.get_xlim()[0] < 0
    assert axis.get_xlim()[1] > 45
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "1", "5", "10", "40"]
    labels = {t.get_text() for t in drawn.legends[0].get_texts()}
    assert labels == {"meta-trained", "steps of meta-training", *beside}
    assert not covered(drawn)


def test_the_curves_of_waves_are_seen_whole(figure):
    source = fewshot.sinusoid()
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    learner = fewshot.maml(net, lr=0.01, num_steps=2, loss="mse")
    drawn = figure(_figures.draw_curves, learner, learner.init(), source, seed=0, rows=2)
    assert len(drawn.axes) == 2
    assert not covered(drawn)


def test_lines_and_curve_of_adaptation_are_of_the_same_episodes(tmp_path, monkeypatch):
    """The points of the curve are of a part of the episodes, as the title says."""
    found = {}

    def draw(path, score, steps, beside, **options):
        found.update(curve=score(max(steps)), beside=beside, **options)

    for name in ("draw_adaptation", "draw_curves"):
        monkeypatch.setattr(job, name, draw if name == "draw_adaptation" else lambda *a, **o: None)
    config = fewshot.FewShotConfig(task="sinusoid", smoke=True, out=str(tmp_path), num_steps=1)
    results = fewshot.few_shot(config)
    assert found["title"] == "maml on sinusoid, 10 points: the first 2 of 10 test episodes"
    assert len(found["curve"].losses) == 2
    assert "maml, untrained" in found["beside"]
    for name, kept in found["beside"].items():
        whole = results["scores"][name]["episodes"]
        assert kept.losses.tolist() == pytest.approx(whole[:2], abs=1e-6)
