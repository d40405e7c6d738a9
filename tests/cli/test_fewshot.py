"""`fmeta fewshot` from the command line to the files."""

import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import fmeta.fewshot._job as job
from fmeta import fewshot
from fmeta.cli import main
from fmeta.fewshot import _glyphs
from fmeta.meta_train import options_table
from fmeta.random import fold_in


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Classes that are stripes of their own widths."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for c in range(6):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(8):
                stripes = 120 * (np.arange(28) % (c + 2) == 0)[None]
                stripes = stripes + draw.integers(0, 99, (28, 28))
                Image.fromarray(stripes.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def run(images, out, *options):
    common = ["--task", "image_folder", "--root", str(images), "--ways", "3", "--out", str(out)]
    return main(["fewshot", "--smoke", *common, *options])


def contents(folder):
    return {
        p.name: p.read_bytes().replace(str(folder).encode(), b"OUT")
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.endswith("timing.jsonl")
    }


LEARNERS = ("maml", "reptile", "snail", "protonet", "fine_tune")


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_learner_is_trained_tested_and_drawn(images, tmp_path, learner, capsys):
    assert run(images, tmp_path, "--learner", learner) == 0
    folder = tmp_path / "fewshot"
    for name in ("episodes.png", "adaptation.png", "weights.safetensors", "metrics.jsonl"):
        assert (folder / name).stat().st_size > 0
    results = json.loads((folder / "results.json").read_text())
    names = set(results["scores"])
    assert f"{learner}, meta-trained" in names
    assert "nearest neighbour on pixels" in names
    assert all(0 <= s["mean"] <= 1 and s["half_interval"] >= 0 for s in results["scores"].values())
    text = capsys.readouterr().out
    assert "3-way 1-shot" in text
    assert "transductive" in text
    used = fewshot.load_run(folder)
    scores = fewshot.evaluate(
        used.learner, used.meta_params, used.source, num_episodes=10, seed=job._TEST, batch_size=25
    )
    reported = torch.tensor(results["scores"][f"{learner}, meta-trained"]["episodes"])
    torch.testing.assert_close(scores.accuracies, reported, rtol=0, atol=1e-6)


@pytest.mark.parametrize("learner", ["maml", "snail"])
def test_waves_have_curves_and_no_neighbours(tmp_path, learner, capsys):
    options = ["--task", "sinusoid", "--out", str(tmp_path), "--learner", learner]
    assert main(["fewshot", "--smoke", *options]) == 0
    assert "sinusoid, 10 points: 10 test episodes" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "fewshot" / "adaptation.png").stat().st_size > 0
    results = json.loads((tmp_path / "fewshot" / "results.json").read_text())
    assert results["measure"] == "mean squared error"
    assert results["batch_norm"] == "none"
    assert not any("neighbour" in name for name in results["scores"])
    rows = {f"{learner}, meta-trained", "pretrained on all sinusoids, fine-tuned, 1 step"}
    if learner == "maml":
        rows |= {"maml, meta-trained, 1 step", "pretrained on all sinusoids, fine-tuned, 5 steps"}
    assert rows < set(results["scores"])
    assert all(results["scores"][name]["mean"] > 0 for name in rows)
    assert set(results["fine_tuning_rates"]) == ({"1", "5"} if learner == "maml" else {"1"})


def test_an_interrupted_run_goes_on_to_the_same_bytes(images, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(images, whole) == 0
    real = job.estimator

    def stopping(*args, **options):
        made = real(*args, **options)

        def estimate(meta_params, state):
            if state.step == 3:
                raise KeyboardInterrupt
            return made.estimate(meta_params, state)

        return made._replace(estimate=estimate)

    with monkeypatch.context() as patch:
        patch.setattr(job, "estimator", stopping)
        assert run(images, parts) == 130
    told = f"state is saved, and --resume goes on from there: fmeta fewshot --resume --out {parts}"
    assert told in capsys.readouterr().err
    assert main(["fewshot", "--resume", "--out", str(parts)]) == 0
    assert contents(parts) == contents(whole)


def test_a_run_that_is_interrupted_before_its_first_state_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(progress):
        raise KeyboardInterrupt

    options = ["fewshot", "--smoke", "--root", str(tmp_path / "cache"), "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(_glyphs, "_build", interrupted)
        assert main(options) == 130
    told = capsys.readouterr().err
    assert "interrupted before there was anything to save; --resume starts the run: fmeta" in told
    assert "state is saved" not in told


def copied(images, out, *splits):
    for split in splits:
        shutil.copytree(images / split, out / split)
    return out


def test_without_classes_to_validate_on_those_of_the_test_are_left_alone(
    images, tmp_path, monkeypatch, capsys
):
    root, used = copied(images, tmp_path / "images", "train", "test"), []
    real = job.evaluate

    def evaluate(*args, **options):
        used.append((options.get("split", "test"), capsys.readouterr().out))
        return real(*args, **options)

    monkeypatch.setattr(job, "evaluate", evaluate)
    assert run(root, tmp_path, "--learner", "protonet") == 0
    assert {split for split, _ in used} == {"test"}
    assert "testing on" in used[0][1]  # and not before
    assert "no validation split" in " ".join(capsys.readouterr().out.split())
    metrics = (tmp_path / "fewshot" / "metrics.jsonl").read_text()
    assert "validation" not in metrics


def test_without_classes_to_test_on_nothing_is_begun(images, tmp_path, capsys):
    root = copied(images, tmp_path / "images", "train", "validation")
    assert run(root, tmp_path, "--learner", "protonet") == 1
    found = capsys.readouterr()
    assert "no split test" in found.err
    assert "outer step" not in found.out


def test_steps_of_fine_tuning_are_those_asked_for(images, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(job, "draw_adaptation", lambda *args, **options: drawn.append(args[2]))
    assert run(images, tmp_path, "--learner", "fine_tune", "--num-steps", "6") == 0
    assert drawn == [{1: False, 3: False, 6: False, 12: True, 24: True, 48: True}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learner", "mamal"], "unknown learner 'mamal': there are maml"),
        (["--task", "letters"], "unknown task 'letters': there are glyphs"),
        (["--task", "image_folder"], "image_folder needs --root"),
        (["--task", "sinusoid", "--learner", "protonet"], "sinusoid is a regression"),
        (["--learner", "snail", "--num-steps", "3"], "snail takes no inner steps: leave out num_s"),
        (["--learner", "protonet", "--inner-lr", "1"], "takes no inner steps: leave out inner_lr"),
        (["--learner", "meta_lstm", "--inner-lr", "1"], "meta_lstm learns how far it goes"),
        (["--ways", "1"], "ways must be at least 2, got 1"),
        (["--shots", "0"], "shots must be at least 1"),
        (["--num-steps", "0"], "num_steps must be at least 1"),
        (["--patience", "0"], "patience must be at least 1"),
        (["--inner-lr", "nan"], "inner_lr must be positive and finite, got nan"),
        (["--outer-lr", "inf"], "outer_lr must be positive and finite"),
        (["--batch-norm", "running"], "batch_norm must be one of transductive, support"),
        (["--task", "sinusoid", "--root", "x"], "sinusoid has no use for root"),
        (["--task", "sinusoid", "--ways", "7"], "sinusoid has no use for ways"),
        (["--task", "sinusoid", "--channels", "8"], "sinusoid has no use for channels"),
        (["--task", "sinusoid", "--batch-norm", "support"], "sinusoid has no use for batch_norm"),
        (["--download"], "glyphs has no use for download: leave it out"),
        (["--task", "omniglot", "--color"], "omniglot has no use for color: leave it out"),
        (["--task", "omniglot"], "fmeta fewshot: --download"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_said(tmp_path, options, message, capsys):
    assert main(["fewshot", "--out", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_smoke_run_makes_no_number_larger(tmp_path, capsys):
    options = ["--task", "sinusoid", "--learner", "snail", "--no-baselines", "--out", str(tmp_path)]
    numbers = ["--test-episodes", "1", "--outer-steps", "3", "--shots", "1", "--queries", "2"]
    assert main(["fewshot", "--smoke", *options, *numbers]) == 0
    assert "sinusoid, 1 point: 1 test episode" in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "fewshot" / "results.json").read_text())
    assert results["episodes"] == 1
    assert results["training"]["outer_steps"] == 3
    source = fewshot.load_run(tmp_path / "fewshot").source
    assert (source.shots, source.queries) == (1, 2)


def test_images_keep_their_colours_if_asked(images, tmp_path):
    assert run(images, tmp_path, "--learner", "protonet", "--no-baselines", "--color") == 0
    assert fewshot.load_run(tmp_path / "fewshot").source.shape == (3, 28, 28)
    grey = fewshot.FewShotConfig(task="image_folder", ways=3, root=str(images))
    assert grey.source().shape == (1, 28, 28)


def test_omniglot_is_downloaded_by_one_process(tmp_path, monkeypatch, capsys):
    """A stand-in for torchvision makes the folders."""
    options = ["--task", "omniglot", "--download", "--root", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert main(["fewshot", *options]) == 1
    assert "pip install 'fmeta[vision]'" in capsys.readouterr().err

    done = []

    def omniglot(root, *, background, download):
        done.append("download")
        part = "background" if background else "evaluation"
        for alphabet in range(6):
            folder = tmp_path / "omniglot-py" / f"images_{part}" / f"a{alphabet}" / "c0"
            folder.mkdir(parents=True)
            for i in range(6):
                Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / f"{i}.png")

    stand_in = types.SimpleNamespace(Omniglot=omniglot)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", stand_in)
    config = fewshot.FewShotConfig(task="omniglot", ways=2, root=str(tmp_path), download=True)
    for first in (True, False):
        ranks = types.SimpleNamespace(is_first=first, wait_for_all=lambda: done.append("wait"))
        assert job._source(config, ranks).ways == 2
        assert done == ["download", "download", "wait"]
        done.remove("wait")


def test_help_is_whole_on_a_terminal_of_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["fewshot", "--help"])
    shown = re.sub(r"[\s│]", "", capsys.readouterr().out)
    for row in options_table(fewshot.FewShotConfig).splitlines()[2:]:
        flag, *_, text = row.strip("| ").split(" | ")
        assert flag.strip("`") in shown
        assert re.sub(r"\s", "", text) in shown


def test_the_glyphs_of_a_run_can_be_looked_at(tmp_path):
    """A few classes in the cache stand for the letters: the rest is the same again."""
    images = torch.randint(0, 256, (6, 24, 28, 28), generator=fold_in(0)).to(torch.uint8)
    stand_in = fewshot.Glyphs(images, tuple("abcdef"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_glyphs, "_build", lambda progress: dict.fromkeys(_glyphs.SCRIPTS, stand_in))
        options = ["--learner", "snail", "--task", "glyphs", "--root", str(tmp_path / "cache")]
        assert main(["fewshot", "--smoke", "--out", str(tmp_path), *options]) == 0
    with Image.open(tmp_path / "fewshot" / "glyphs.png") as sheet:
        shown = np.asarray(sheet.convert("L"))
    assert shown.std() > 10


def test_a_run_that_is_not_there_or_not_at_its_end_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        fewshot.load_run(tmp_path)
    (tmp_path / "config.json").write_text('{"task": "sinusoid"}')
    with pytest.raises(FileNotFoundError, match=r"not come to its end.*--resume"):
        fewshot.load_run(tmp_path)
