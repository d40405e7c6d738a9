"""``fmeta evaluate`` and ``fmeta plot``: files, figures redrawn from them, errors in words."""

import json

import pytest

from fmeta import evaluate, optimizers, pretrained
from fmeta.cli import main

TINY = (
    *("--widths", "6", "--batch-size", "8", "--num-steps", "5", "--num-seeds", "2"),
    *("--tune-seeds", "1", "--baselines", "adam"),
)


def save_weights(path, rule="linear"):
    start = optimizers.get(rule)().init()
    pretrained.save(path, rule, start)


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path):
    save_weights(tmp_path / "weights.safetensors")
    return tmp_path


def metrics(folder, count):
    rows = [{"step": i, "meta_loss": 2.0 - i / 9, "meta_grad_norm": 1.0} for i in range(count)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_evaluated_next_to_its_start_and_baselines(folder, capsys):
    assert run("evaluate", folder, *TINY) == 0
    out = folder / "evaluation-mlp-6"
    assert {p.name for p in out.iterdir()} == {"results.json", "curves.png"}
    results = evaluate.load(out / "results.json")
    assert list(results.evaluations) == ["5 steps"]
    found = results.evaluations["5 steps"]
    assert [o.label for o in found.outcomes.values()] == ["learned rule", "untrained start", "Adam"]
    assert found.num_seeds == 2
    printed = capsys.readouterr().out
    for words in ("learned rule", "untrained start", "Adam", "accuracy", str(out)):
        assert words in printed


def test_the_longest_horizon_of_a_run_is_marked(folder):
    (folder / "config.json").write_text(json.dumps({"seed": 3, "horizons": [2, 4]}))
    assert run("evaluate", folder, *TINY) == 0
    results = evaluate.load(folder / "evaluation-mlp-6" / "results.json")
    assert results.mark == (4, "longest of meta-training")


def test_weights_are_evaluated_as_a_file_on_another_model(folder):
    out = folder / "else" / "where"
    weights = folder / "weights.safetensors"
    options = ("--model", "cnn", "--widths", "2", "3", "--no-online", "--out", out)
    assert run("evaluate", weights, *TINY, *options, "--num-steps", "2", "4") == 0
    results = evaluate.load(out / "results.json")
    assert list(results.evaluations) == ["2 steps", "4 steps"]
    assert results.title == "cnn of width 2-3 on digits"


def test_the_untrained_start_is_that_of_the_runs_seed(folder):
    save_weights(folder / "weights.safetensors", "normalized_mlp")
    losses = []
    for seed in (0, 1):
        (folder / "config.json").write_text(json.dumps({"seed": seed}))
        assert run("evaluate", folder, *TINY, "--overwrite") == 0
        found = evaluate.load(folder / "evaluation-mlp-6" / "results.json").evaluations["5 steps"]
        losses.append(found.outcomes)
    same, other = (
        [float(o[name].train_loss[0]) for o in losses]
        for name in ("learned rule", "untrained start")
    )
    assert same[0] == same[1]
    assert other[0] != other[1]


def test_earlier_results_are_not_overwritten_unless_told(folder, capsys):
    out = folder / "out"
    assert run("evaluate", folder, *TINY, "--out", out) == 0
    before = (out / "results.json").read_bytes()
    assert run("evaluate", folder, *TINY, "--out", out, "--seed", "1") == 1
    assert "holds results already: choose another --out" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before
    assert run("evaluate", folder, *TINY, "--out", out, "--seed", "1", "--overwrite") == 0
    assert (out / "results.json").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--baselines", "adm"], "unknown baseline 'adm': did you mean adam"),
        (["--model", "mpl"], "unknown model 'mpl'"),
        (["--activation", "relo"], "unknown activation 'relo'"),
        (["--num-seeds", "1"], "num_seeds must be at least 2, got 1"),
        (["--num-steps", "0"], "num_steps must be at least 1, got 0"),
        (["--chunk-size", "0"], "chunk_size must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_meant_are_an_error_before_any_work(folder, capsys, options, words):
    assert run("evaluate", folder, *TINY, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("fmeta: ")
    assert words in error
    assert [p.name for p in folder.iterdir()] == ["weights.safetensors"]


def truncated(path):
    path.write_bytes(path.read_bytes()[:-3])


def foreign(path):
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"x": zeros(2)}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "is not a whole safetensors file"),
        (foreign, "was not written by fmeta.pretrained.save"),
        (lambda path: path.write_text("hello"), "is not a whole safetensors file"),
        (lambda path: path.unlink(), "holds no weights.safetensors"),
    ],
    ids=["truncated", "foreign", "text", "missing"],
)
def test_weights_that_cannot_be_read_are_an_error_in_words(folder, capsys, damage, words):
    damage(folder / "weights.safetensors")
    assert run("evaluate", folder, *TINY) == 1
    assert words in capsys.readouterr().err
    assert not (folder / "evaluation-mlp-6").exists()


def test_a_path_that_is_not_there_is_an_error_in_words(tmp_path, capsys):
    for command in ("evaluate", "plot"):
        assert run(command, tmp_path / "none") == 1
        assert "there is no f" in capsys.readouterr().err


def test_an_unwritable_folder_is_an_error_before_any_work(folder, capsys):
    (folder / "file").write_text("x")
    assert run("evaluate", folder, *TINY, "--out", folder / "file" / "out") == 1
    captured = capsys.readouterr()
    assert "cannot write into the folder" in captured.err
    assert "tuning" not in captured.out


def test_an_interrupted_evaluation_writes_nothing(folder, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "run", interrupt)
    assert run("evaluate", folder, *TINY) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list((folder / "evaluation-mlp-6").iterdir()) == []


def test_figures_are_redrawn_from_the_files(folder, capsys):
    assert run("evaluate", folder, *TINY, "--out", folder / "out") == 0
    before = (folder / "out" / "curves.png").read_bytes()
    (folder / "out" / "curves.png").unlink()
    metrics(folder / "out", 4)
    assert run("plot", folder / "out") == 0
    assert (folder / "out" / "curves.png").read_bytes() == before
    assert (folder / "out" / "meta_training.png").exists()
    assert "meta_training.png" in capsys.readouterr().out


def test_several_runs_are_drawn_into_one_figure(folder, monkeypatch):
    for name in "ab":
        assert run("evaluate", folder, *TINY, "--out", folder / name) == 0
        metrics(folder / name, 3)
    calls = []
    monkeypatch.setattr("fmeta.plot.evaluations", lambda *args, **kw: calls.append((args, kw)))
    monkeypatch.setattr("fmeta.plot.meta_training", lambda *args, **kw: calls.append((args, kw)))
    assert run("plot", folder / "a", folder / "b", "--out", folder / "figures") == 0
    assert [args[0].name for args, _ in calls] == ["curves.png", "meta_training.png"]
    for args, _ in calls:
        assert list(args[1]) == [str(folder / "a"), str(folder / "b")]


def test_a_line_that_a_killed_run_left_unfinished_is_passed_over(tmp_path):
    metrics(tmp_path, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "meta')
    assert run("plot", tmp_path) == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics.jsonl", "hello\n", "line 1 is no metrics of an outer step"),
        ("metrics.jsonl", '{"a": 1}\n', "line 1 is no metrics of an outer step"),
        ("results.json", "{", "is not a whole JSON file"),
        ("results.json", "{}", "holds no evaluations"),
        ("other.txt", "", "neither results.json nor metrics.jsonl"),
    ],
)
def test_files_that_cannot_be_drawn_are_an_error_in_words(tmp_path, capsys, name, text, words):
    (tmp_path / name).write_text(text)
    assert run("plot", tmp_path) == 1
    assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("command", ["train", "evaluate", "plot"])
def test_help_ends_with_examples(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code in (0, None)
    after = capsys.readouterr().out.split("examples:")[1]
    assert after.strip().startswith(f"fmeta {command}")


@pytest.mark.parametrize("options", [["evaluate"], ["evaluate", "x", "--wdths", "3"]])
def test_missing_and_unknown_options_exit_with_2(capsys, options):
    with pytest.raises(SystemExit) as exit:
        main(options)
    assert exit.value.code == 2
    assert "examples:" not in capsys.readouterr().out


def test_the_list_of_optimizers_tells_which_are_learned(capsys):
    assert main(["optimizers"]) == 0
    out = capsys.readouterr().out
    count = sum(x.numel() for x in optimizers.linear().init().values())
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    learns = {row[1].strip(): row[2].strip() for row in rows if row[1].strip()}
    assert learns["linear"] == str(count)
    assert learns["adam"] == ""


def test_the_folder_of_a_run_is_left_alone(tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    save_weights(weights)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert main(["evaluate", str(weights), "--out", str(tmp_path / "run"), "--overwrite"]) == 1
    assert "is the folder of a run" in capsys.readouterr().err
