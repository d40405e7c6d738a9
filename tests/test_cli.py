"""The command line: everything is written, nothing is overwritten, errors are sentences."""

import json
import signal

import pytest

from fmeta import optimizers, pretrained
from fmeta.cli import main
from fmeta.meta_train import _digits_job

WRITTEN = {
    "curves.png",
    "results.json",
    "weights.safetensors",
    "config.json",
    "metrics.jsonl",
    "checkpoint",
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
    full = _digits_job.full
    calls = [0]

    def stopping(*args, **kwargs):
        estimator = full(*args, **kwargs)

        def estimate(meta_params, state):
            if getattr(state, "seed", None) == 0:  # the training stream, not validation
                calls[0] += 1
                if calls[0] > at:
                    raise KeyboardInterrupt
            return estimator.estimate(meta_params, state)

        return estimator._replace(estimate=estimate)

    with monkeypatch.context() as patch:
        patch.setattr(_digits_job, "full", stopping)
        return train(folder, *options)


def test_a_run_writes_all_its_files(finished):
    assert {p.name for p in (finished / "digits").iterdir()} == WRITTEN
    assert (finished / "digits" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_its_results_can_be_read(finished):
    results = json.loads((finished / "digits" / "results.json").read_text())
    assert results["learned"] in results["table"]
    assert len(results["table"]) == 4
    assert set(results["held_out_loss_minus"]) == results["table"].keys() - {results["learned"]}
    for row in results["held_out_loss_minus"].values():
        assert row["low"] <= row["mean"] <= row["high"]


def test_its_metrics_have_a_line_for_each_outer_step(finished):
    assert [m["step"] for m in metrics(finished)] == [0, 1, 2, 3]


def test_its_weights_are_loaded_by_pretrained(finished):
    _, weights = pretrained.load(finished / "digits" / "weights.safetensors")
    assert weights["weight"].shape == (1, 2)
    assert not weights["weight"].equal(optimizers.linear().init()["weight"])


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
    assert "interrupted" in capsys.readouterr().err
    assert (tmp_path / "digits" / "checkpoint" / "state.safetensors").exists()
    assert not (tmp_path / "digits" / "weights.safetensors").exists()
    assert train(tmp_path, "--resume") == 0
    for name in ("weights.safetensors", "results.json", "metrics.jsonl"):
        got, want = ((f / "digits" / name).read_bytes() for f in (tmp_path, finished))
        assert got == want, name


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
        (["--horizon", "-1"], "horizon must be at least 1, got -1"),
        (["--eval-seeds", "1"], "eval_seeds must be at least 2"),
        (["--outer-lr", "0"], "outer_lr must be positive, got 0"),
        (["--outer-lr", "nan"], "outer_lr must be positive, got nan"),
        (["--first-order", "yes"], "first_order must be one of none, gradients, inputs, got 'yes'"),
        (["--checkpoint", "log"], "checkpoint must be none, sqrt or a number of snapshots"),
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


def test_all_optimizers_are_listed(capsys):
    assert main(["optimizers"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in optimizers.BUILDERS)


def test_first_order_and_checkpoint_reach_the_run(tmp_path, finished):
    assert train(tmp_path, "--first-order", "gradients", "--checkpoint", "3") == 0
    exact, first = (metrics(f)[0] for f in (finished, tmp_path))
    assert exact["meta_loss"] == pytest.approx(first["meta_loss"], rel=1e-5)
    assert exact["meta_grad_norm"] != pytest.approx(first["meta_grad_norm"], rel=1e-3)


@pytest.mark.parametrize("option", ["--patience", "--validate-every", "--threads"])
def test_a_number_that_cannot_be_meant_leaves_no_folder_behind(tmp_path, capsys, option):
    assert train(tmp_path / "runs", option, "0") == 1
    assert "must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
