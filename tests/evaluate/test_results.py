"""Evaluations as files and tables: nothing is lost, damage is told."""

import json
import math

import pytest
import torch
from rich.console import Console

from fmeta import evaluate, optimizers, trees

LENGTHS = {"num_steps": 12, "num_seeds": 4, "seed": 5}


@pytest.fixture(scope="module")
def calm(quadratics):
    mine = {"mine": (optimizers.sgd(0.3), {}), "still": (optimizers.sgd(0.0), {})}
    return evaluate.run(quadratics, mine, **LENGTHS, baselines=["adam", "sgd_cosine"])


@pytest.fixture(scope="module")
def wild(cliffs):
    return evaluate.run(
        cliffs, {"mine": (optimizers.sgd(0.3), {})}, **LENGTHS, baselines=[], reference="mine"
    )


@pytest.fixture
def results(calm, wild):
    return evaluate.Results({"calm": calm, "wild": wild}, "both", (10, "here"))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_file_gives_everything_back_but_the_full_curves(results, tmp_path):
    results.save(tmp_path / "results.json")
    back = evaluate.load(tmp_path / "results.json")
    assert (back.title, back.mark, list(back.evaluations)) == (
        "both",
        (10, "here"),
        ["calm", "wild"],
    )
    for name, before in results.evaluations.items():
        after = back.evaluations[name]
        assert after._replace(outcomes={}) == before._replace(outcomes={})
        assert list(after.outcomes) == list(before.outcomes)
        for k, outcome in before.outcomes.items():
            got = after.outcomes[k]
            assert got.curves is None
            assert (got.label, got.role, got.lr, got.search) == (
                outcome.label,
                outcome.role,
                outcome.lr,
                outcome.search,
            )
            for field in ("train_loss", "held_out_loss", "metrics", "steps", "diverged"):
                same(getattr(got, field), getattr(outcome, field))
            same(got.train, outcome.train)
            same(got.held_out, outcome.held_out)


def test_a_file_written_twice_is_the_same(results, tmp_path):
    results.save(tmp_path / "a.json")
    evaluate.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_file_is_json_without_infinities_and_tells_the_differences(results, tmp_path):
    results.save(tmp_path / "results.json")

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "results.json").read_text()
    value = json.loads(text, parse_constant=refuse)["evaluations"]
    calm = results.evaluations["calm"]
    told = value["calm"]["differences"]["mine - adam"]
    assert told["held_out_loss"]["mean"] == calm.paired("mine", "adam", "held_out_loss").mean
    assert told["log_held_out_loss"]["high"] == pytest.approx(
        calm.paired("mine", "adam", "held_out_loss", log=True).high
    )
    assert set(value["calm"]["differences"]) == {
        f"{a} - {b}" for a in ("mine", "still") for b in calm.outcomes if a != b
    }
    assert value["wild"]["summary"]["mine"]["train_loss"]["mean"] is None


def test_further_entries_of_a_file_are_left_alone(results, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"outer_steps": 3, **results.to_dict()}))
    assert list(evaluate.load(path).evaluations) == ["calm", "wild"]


def test_an_evaluation_is_plain_values_and_back(calm):
    back = evaluate.Evaluation.from_dict(json.loads(json.dumps(calm.to_dict())))
    same(back.values("mine", "held_out_loss"), calm.values("mine", "held_out_loss"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "is not a whole JSON file"),
        (lambda text: "[1]", "holds no evaluations"),
        (lambda text: '{"table": {}}', "holds no evaluations"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "has format 9"),
        (lambda text: text.replace('"num_steps"', '"numb"'), "no whole evaluation: KeyError"),
        (lambda text: text.replace('"mean": [', '"mean": "x", "y": ['), "no whole evaluation"),
    ],
)
def test_damaged_and_foreign_files_are_told(results, tmp_path, change, words):
    path = tmp_path / "results.json"
    results.save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=words) as error:
        evaluate.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        evaluate.load(tmp_path / "none.json")


def printed(evaluation, width=100):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(evaluation.table("a [title]"))
    return capture.get()


def row(text, start):
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_a_table_has_the_numbers_of_all(calm):
    text = printed(calm)
    assert "a [title]" in text
    for name, outcome in calm.outcomes.items():
        line = row(text, f"{outcome.label} ")
        assert f"{calm.summary(name, 'held_out_loss').mean:.4g}" in line
        if name != "mine":
            mean, low, high, _ = calm.paired("mine", name, "held_out_loss", log=True)
            assert f"{math.exp(mean):.3f} [{math.exp(low):.3f}, {math.exp(high):.3f}]" in line
    assert "never" in row(text, "still")


def test_a_table_tells_what_diverged(wild):
    count = int(wild.outcomes["mine"].diverged.sum())
    text = printed(wild)
    assert 0 < count < 4
    assert f"mine: {count} of 4 seeds diverged." in text
    assert "diverged" in next(
        line for line in text.splitlines() if line.strip().startswith("mine ")
    )


def test_a_table_tells_of_a_best_rate_at_the_edge(calm):
    search = evaluate.Search(0.1, (0.01, 0.1), (2.0, 1.0), 0)
    outcomes = {**calm.outcomes, "adam": calm.outcomes["adam"]._replace(search=search)}
    text = printed(calm._replace(outcomes=outcomes))
    assert "Adam: the best learning rate lies at an edge of the grid." in text


def test_curves_in_files_are_short_and_keep_the_mean():
    from fmeta.evaluate._evaluation import band

    losses = torch.rand(3, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    thin = band(losses)
    assert len(thin.steps) <= 100
    assert thin.steps[-1] == 5000
    widths = torch.diff(thin.steps, prepend=torch.zeros(1, dtype=torch.float64))
    mean = (thin.mean * widths).sum() / 5000
    torch.testing.assert_close(mean, losses.mean(), rtol=1e-5, atol=0)
    assert (thin.low <= thin.mean).all()
    assert (thin.mean <= thin.high).all()
    assert all(len(x) == len(thin.steps) for x in trees.leaves(thin))
