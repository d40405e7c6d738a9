"""The command line: everything is written, nothing is overwritten, errors are sentences."""

import errno
import io
import json
import os
import signal
import sys

import pytest
import torch
from rich.console import Console

from fmeta import evaluate, optimizers, pretrained
from fmeta.cli import _progress, main
from fmeta.meta_train import _digits_job

WRITTEN = {
    "curves.png",
    "results.json",
    "weights.safetensors",
    "config.json",
    "metrics.jsonl",
    "metrics.timing.jsonl",
    "checkpoint",
    "tuning",
}


@pytest.fixture(autouse=True)
def _own_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def train(folder, *options):
    return main(["train", "--smoke", "--out", str(folder), *options])


def metrics(folder):
    lines = (folder / "digits" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert train(folder) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    return folder


def interrupted(folder, monkeypatch, at, *options):
    """A run that Ctrl-C stops before outer step ``at``."""
    made = _digits_job.estimators.pes
    calls = [0]

    def stopping(*args, **kwargs):
        estimator = made(*args, **kwargs)

        def estimate(meta_params, state):
            calls[0] += 1
            if calls[0] > at:
                raise KeyboardInterrupt
            return estimator.estimate(meta_params, state)

        return estimator._replace(estimate=estimate)

    with monkeypatch.context() as patch:
        patch.setattr(_digits_job.estimators, "pes", stopping)
        return train(folder, *options)


def test_a_run_writes_all_its_files(finished):
    assert {p.name for p in (finished / "digits").iterdir()} == WRITTEN
    assert (finished / "digits" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_its_results_can_be_read(finished):
    found = evaluate.load(finished / "digits" / "results.json")
    assert list(found.evaluations) == ["8 steps", "16 steps"]
    for one in found.evaluations.values():
        assert list(one.outcomes) == ["basis_mlp, meta-trained", "basis_mlp, untrained", "adam"]
        first, *others = one.outcomes
        for name in others:
            row = one.paired(first, name, "held_out_loss")
            assert row.low <= row.mean <= row.high
    training = json.loads((finished / "digits" / "results.json").read_text())["training"]
    assert training == {"outer_steps": 4, "stopped_early": False, "skipped": 0}


def test_its_metrics_have_a_line_for_each_outer_step(finished):
    assert [m["step"] for m in metrics(finished)] == [0, 1, 2, 3]


def test_its_weights_are_loaded_by_pretrained(finished):
    _, weights = pretrained.load(finished / "digits" / "weights.safetensors")
    start = optimizers.basis_mlp().init(torch.Generator().manual_seed(0))
    assert weights.keys() == start.keys()
    assert not weights["log_lr"].equal(start["log_lr"])


def test_a_second_run_into_the_folder_is_refused(finished, capsys):
    before = (finished / "digits" / "results.json").read_bytes()
    assert train(finished) == 1
    error = capsys.readouterr().err
    assert "digits holds a run already: choose another --name, delete it, or add --resume" in error
    assert (finished / "digits" / "results.json").read_bytes() == before


def test_another_name_is_another_run(finished):
    assert train(finished, "--name", "again") == 0
    same = [(finished / n / "weights.safetensors").read_bytes() for n in ("digits", "again")]
    assert same[0] == same[1]  # the same seed


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = (finished / "digits" / "weights.safetensors").read_bytes()
    assert train(finished, "--resume") == 0
    assert (finished / "digits" / "weights.safetensors").read_bytes() == before


def test_resuming_with_other_settings_is_refused(finished, capsys):
    assert train(finished, "--resume", "--outer-lr", "0.5") == 1
    assert "other settings (outer_lr)" in capsys.readouterr().err


@pytest.mark.parametrize("at", [0, 3])
def test_an_interrupted_run_resumes_as_if_it_had_not_been(
    finished, tmp_path, monkeypatch, capsys, at
):
    assert interrupted(tmp_path, monkeypatch, at) == 130
    how = f"--resume goes on from there: fmeta train --resume --out {tmp_path} --name digits"
    assert how in capsys.readouterr().err
    assert (tmp_path / "digits" / "checkpoint" / "state.safetensors").exists()
    assert not (tmp_path / "digits" / "weights.safetensors").exists()
    assert train(tmp_path, "--resume") == 0
    for name in ("weights.safetensors", "results.json", "metrics.jsonl"):
        got, want = ((f / "digits" / name).read_bytes() for f in (tmp_path, finished))
        assert got == want, name


@pytest.mark.parametrize("phase", ["run", "evaluations"])
def test_a_run_interrupted_after_training_goes_straight_on_with_the_comparison(
    finished, tmp_path, monkeypatch, capsys, phase
):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        module = _digits_job.plot if phase == "evaluations" else _digits_job.evaluate
        patch.setattr(module, phase, stop)
        assert train(tmp_path) == 130
    assert "fmeta train --resume" in capsys.readouterr().err
    assert train(tmp_path, "--resume") == 0
    assert "meta-loss" not in capsys.readouterr().out
    for name in ("weights.safetensors", "results.json", "metrics.jsonl", "curves.png"):
        got, want = ((f / "digits" / name).read_bytes() for f in (tmp_path, finished))
        assert got == want, name


def test_resume_alone_takes_the_settings_of_the_run(tmp_path, monkeypatch, capsys):
    options = ["--outer-lr", "0.01", "--name", "mine"]
    assert interrupted(tmp_path, monkeypatch, 2, *options) == 130
    assert main(["train", "--resume", "--out", str(tmp_path), "--name", "mine"]) == 0
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert (config["outer_lr"], config["num_steps"], config["smoke"]) == (0.01, 4, True)


def test_resuming_a_finished_run_says_so_and_shows_the_table_again(finished, capsys):
    assert main(["train", "--resume", "--out", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "is finished" in out
    assert "untrained" in out


def test_defaults_are_taken_from_a_file_and_overridden_by_flags(tmp_path, finished):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"smoke": True, "seed": 3, "outer_lr": 0.2, "std": 0.1}))
    options = [
        "--config",
        str(file),
        "--out",
        str(tmp_path),
        "--seed",
        "0",
        "--outer-lr=0.004",
        "--std",
        "0.03",
    ]
    assert main(["train", *options]) == 0
    assert metrics(tmp_path) == metrics(finished)  # with the seed and the rate of the defaults


def test_a_file_of_settings_does_not_go_with_resuming(finished, capsys):
    file = str(finished / "digits" / "config.json")
    assert main(["train", "--resume", "--out", str(finished), "--config", file]) == 1
    assert "--config and --resume exclude each other" in capsys.readouterr().err


def test_the_config_of_a_run_is_such_a_file(finished, tmp_path):
    file = str(finished / "digits" / "config.json")
    assert main(["train", "--config", file, "--out", str(tmp_path)]) == 0
    assert metrics(tmp_path) == metrics(finished)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"horizn": 5}', "unknown option 'horizn': did you mean horizons?"),
        ('{"truncation": "long"}', "option 'truncation' must be of type int, got 'long'"),
        ('{"truncation": 0}', "truncation must be at least 1, got 0"),
        ("{", "is not a whole JSON file"),
        (None, "there is no file"),
    ],
)
def test_a_file_of_settings_that_does_not_fit_is_an_error_before_any_work(
    tmp_path, capsys, content, words
):
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "runs")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_tensorboard_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(tmp_path, "--tensorboard") == 1
    assert "pip install 'fmeta[tensorboard]'" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence_and_the_run_goes_on_when_there_is_room(
    finished, tmp_path, monkeypatch, capsys
):
    real, calls = os.fsync, [0]

    def full(file):
        calls[0] += 1
        if calls[0] > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert train(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("fmeta: cannot write ")
    assert "No space left on device" in error
    assert f"free some space, then: fmeta train --resume --out {tmp_path} --name digits" in error
    assert train(tmp_path, "--resume") == 0
    assert metrics(tmp_path) == metrics(finished)


def test_resuming_where_there_is_no_run_says_so(tmp_path, capsys):
    assert train(tmp_path, "--resume") == 1
    assert "there is no run to resume in" in capsys.readouterr().err


def test_resuming_a_damaged_checkpoint_says_so(tmp_path, monkeypatch, capsys):
    interrupted(tmp_path, monkeypatch, 3)
    path = tmp_path / "digits" / "checkpoint" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert train(tmp_path, "--resume") == 1
    assert "state.safetensors is not a whole safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "liner"], "unknown optimizer 'liner': did you mean linear"),
        (["--rule", "adam"], "adam has nothing to learn: choose a learned rule"),
        (["--rule", "per-parameter-sgd"], "unknown optimizer 'per-parameter-sgd'"),
        (["--rule", "per_parameter_sgd"], "'per_parameter_sgd' needs arguments"),
        (["--num-steps", "0"], "num_steps must be at least 1, got 0"),
        (["--horizons", "20", "0"], "horizons must be numbers of at least 1, got (20, 0)"),
        (["--eval-lengths", "1", "1"], "eval_lengths must differ"),
        (["--std", "0"], "std must be positive, got 0"),
        (["--tasks", "mlp"], "a task is model:widths[:activation], like mlp:24,24:tanh, got 'mlp'"),
        (["--tasks", "mpl:8"], "task 'mpl:8': unknown model 'mpl'"),
        (["--eval-task", "mlp:8:relo"], "task 'mlp:8:relo': unknown activation 'relo'"),
        (["--num-tasks", "1"], "num_tasks must be at least the number of tasks, got 1"),
        (["--baselines", "adan"], "unknown baseline 'adan': did you mean adam"),
        (["--estimator", "ps"], "estimator must be one of pes, nres, es_single, es, trun"),
        (
            ["--estimator", "full", "--compile"],
            "compile goes with the estimators pes, nres, es_single, es, truncated, not with full",
        ),
        (["--eval-seeds", "1"], "eval_seeds must be at least 2"),
        (["--outer-lr", "0"], "outer_lr must be positive, got 0"),
        (["--outer-lr", "nan"], "outer_lr must be positive, got nan"),
        (["--name", "a/b"], "name must be the name of a folder, got 'a/b'"),
    ],
)
def test_settings_that_cannot_be_meant_are_an_error_before_any_work(
    tmp_path, capsys, options, words
):
    assert train(tmp_path, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("fmeta: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_an_error_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert train(tmp_path / "file" / "runs") == 1
    error = capsys.readouterr().err
    assert "cannot write into the folder" in error
    assert "choose another one" in error


@pytest.mark.parametrize("options", [["train", "--no-such", "1"], ["fly"], []])
def test_an_unknown_option_or_command_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as exit:
        main(options)
    assert exit.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("options", [["--help"], ["train", "--help"]])
def test_help_exits_with_0(options, capsys):
    with pytest.raises(SystemExit) as exit:
        main(options)
    assert exit.value.code in (0, None)
    assert "fmeta" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 160])
def test_all_optimizers_are_listed(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["optimizers"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in optimizers.BUILDERS)
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│ ")}
    assert "347" in rows["normalized_mlp"]  # weights
    assert " 16 " in rows["normalized_mlp"]  # bytes: four numbers a coordinate
    assert "1412.6980" in out  # the paper
    assert "num_steps" in rows["basis_mlp"]
    assert ("Gradient descent" in out) == (width == 160)
    assert width == 160 or len(out.splitlines()) < 3 * len(rows) + 12  # titles would make it twice


def test_all_about_one_optimizer(capsys):
    assert main(["optimizers", "adam", "per_parameter_sgd"]) == 0
    out = capsys.readouterr().out
    assert "adam(lr=0.001, betas=(0.9, 0.999)" in out
    assert "8 bytes of hidden state" in out
    assert "learns 1 a parameter" in out


def test_an_optimizer_that_is_not_there(capsys):
    assert main(["optimizers", "adm"]) == 1
    assert "did you mean adam" in capsys.readouterr().err


@pytest.mark.parametrize("estimator", ["nres", "es_single", "truncated", "full", "score_function"])
def test_every_estimator_trains(tmp_path, finished, estimator):
    assert train(tmp_path, "--estimator", estimator) == 0
    other, of_pes = (metrics(f)[0] for f in (tmp_path, finished))
    assert other["meta_grad_norm"] != of_pes["meta_grad_norm"]


@pytest.mark.parametrize("option", ["--patience", "--validate-every"])
def test_a_number_that_cannot_be_meant_leaves_no_folder_behind(tmp_path, capsys, option):
    assert train(tmp_path / "runs", option, "0") == 1
    assert "must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


ROWS = [
    {"step": 0, "meta_loss": 2.5, "meta_grad_norm": 1.0, "validation": 2.25},
    {"step": 1, "meta_loss": 2.0, "meta_grad_norm": 0.5, "diverged": 0.5,
     "diverged_tasks": [{"task": 3, "inner_step": 7}]},
    {"step": 2, "meta_loss": float("nan"), "meta_grad_norm": float("nan"), "skipped": 1},
]  # fmt: skip


def told(rows, total, **console):
    file = io.StringIO()
    console = Console(file=file, width=200, **console)
    with _progress.progress_of(console, total) as (on_step, on_phase):
        on_phase("a phase [of two]")
        for row in rows:
            on_step(row)
    return file.getvalue()


@pytest.mark.parametrize("console", [{}, {"force_terminal": True}], ids=["plain", "terminal"])
def test_progress_tells_losses_and_what_diverged(console):
    text = told(ROWS, 3, **console)
    assert "a phase [of two]" in text
    assert "outer step 1: 1 of 2 tasks diverged: task 3 at inner step 7" in text
    assert "outer step 2: nothing finite to learn from, skipped" in text
    assert "meta-loss nan, meta-gradient nan, validation 2.2500" in text  # the last one there was
    assert ("3/3" in text) == bool(console)
    assert ("\x1b" in text) == bool(console)


def test_plain_progress_is_about_ten_lines():
    rows = [{**ROWS[0], "step": step} for step in range(1000)]
    assert 10 <= len(told(rows, 1000).splitlines()) <= 13


def test_only_the_first_divergences_are_told_one_by_one():
    rows = [{**ROWS[1], "step": step} for step in range(50)]
    text = told(rows, 50)
    assert text.count("tasks diverged: ") == 5
    assert text.count("further ones are in metrics.jsonl") == 1
