"""Logs are valid JSON lines, appended whole, and continued without a seam."""

import errno
import json
import math
import os
import sys
import types

import pytest
import torch

import fmeta
from fmeta.meta_train import resume, run
from fmeta.meta_train._log import JsonLines, StepLog, timing_path

W = {"w": torch.tensor(3.0)}
SGD = fmeta.optimizers.sgd(0.1)


def rows(path):
    strict = lambda text: json.loads(text, parse_constant=pytest.fail)
    return [strict(line) for line in path.read_text().splitlines()]


def write(path, steps, at=0):
    log = JsonLines(path, at)
    for step in steps:
        log.write({"step": step, "meta_loss": step / 3})
    log.close()


def test_the_log_holds_the_history(noisy, tmp_path):
    path = tmp_path / "m.jsonl"
    result = run(noisy({1: {0: 3}}), W, outer=SGD, num_steps=4, log=path)
    assert rows(path) == result.history
    assert rows(path)[1]["diverged_tasks"] == [{"task": 0, "inner_step": 3}]


def test_wall_clock_seconds_are_in_a_file_of_their_own(noisy, tmp_path):
    path = tmp_path / "m.jsonl"
    run(noisy(), W, outer=SGD, num_steps=4, log=path)
    assert timing_path(path) == tmp_path / "m.timing.jsonl"
    assert [row["step"] for row in rows(timing_path(path))] == [0, 1, 2, 3]
    assert all(row["seconds"] > 0 for row in rows(timing_path(path)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_is_null(tmp_path, value):
    log = JsonLines(tmp_path / "m.jsonl", 0)
    log.write({"step": 0, "meta_loss": value})
    log.close()
    assert rows(tmp_path / "m.jsonl") == [{"step": 0, "meta_loss": None}]


@pytest.mark.parametrize("rest", ["", '{"step": 3, "me', '{"step": 3}\n{"step": 4}\n{"st'])
def test_what_comes_after_the_checkpoint_is_cut_off(tmp_path, rest):
    path = tmp_path / "m.jsonl"
    write(path, range(3))
    path.write_text(path.read_text() + rest)
    write(path, [3, 4], at=3)
    assert [row["step"] for row in rows(path)] == [0, 1, 2, 3, 4]
    write(path, [0], at=0)
    assert [row["step"] for row in rows(path)] == [0]


def test_a_log_with_missing_lines_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, range(3))
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"m\.jsonl holds the outer steps before 3.* at 5.*put .* back"
    ):
        JsonLines(path, 5)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"epoch": 1}\n', "\xff\n"])
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.txt is no log of outer steps.*another file"):
        JsonLines(path, 1)
    assert path.read_text() == text


def test_a_log_that_exists_is_not_written_into_by_another_run(noisy, tmp_path):
    path = tmp_path / "m.jsonl"
    run(noisy(), W, outer=SGD, num_steps=2, log=path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"m\.jsonl is the log of another run.*resume"):
        run(noisy(), W, outer=SGD, num_steps=3, log=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("lost", ["m.jsonl", "m.timing.jsonl"])
def test_a_log_that_is_gone_is_refused_as_one_with_missing_lines(noisy, tmp_path, lost):
    log = {"log": tmp_path / "m.jsonl"}
    run(noisy(), W, outer=SGD, num_steps=2, checkpoint_folder=tmp_path, **log)
    (tmp_path / lost).unlink()
    with pytest.raises(ValueError, match=rf"{lost} holds .* before 0.* at 2.*resume without a log"):
        resume(tmp_path, noisy(), W, outer=SGD, num_steps=4, **log)
    assert not (tmp_path / lost).exists()
    assert resume(tmp_path, noisy(), W, outer=SGD, num_steps=4).step == 4


def test_a_run_stopped_before_its_first_line_is_resumed_without_a_log(noisy, tmp_path):
    def stop(step):
        raise KeyboardInterrupt

    path = tmp_path / "m.jsonl"
    options = {"outer": SGD, "num_steps": 2, "log": path}
    with pytest.raises(KeyboardInterrupt):
        run(noisy(before=stop), W, checkpoint_folder=tmp_path, **options)
    path.unlink()
    resume(tmp_path, noisy(), W, **options)
    assert [row["step"] for row in rows(path)] == [0, 1]


def test_a_full_disk_names_the_log_and_the_whole_lines_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    write(path, range(2))
    log, real = JsonLines(path, 2), os.write

    def full(file, data):
        real(file, bytes(data)[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"cannot write .*m\.jsonl: No space left") as error:
            log.write({"step": 2})
    log.close()
    assert error.value.errno == errno.ENOSPC
    write(path, [2], at=2)
    assert [row["step"] for row in rows(path)] == [0, 1, 2]


def test_tensorboard_that_is_not_installed_is_an_error_before_any_work(
    noisy, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder = tmp_path / "run"
    with pytest.raises(ImportError, match=r"pip install 'fmeta\[tensorboard\]'"):
        run(noisy(), W, outer=SGD, num_steps=2, tensorboard=folder, checkpoint_folder=folder)
    assert not folder.exists()


class Writer:
    """Stands in for TensorBoard's."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.seen, self.closed = folder, purge_step, [], False

    def add_scalar(self, name, value, step):
        self.seen.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_gets_the_scalars_from_the_step_gone_on_from(tmp_path, monkeypatch):
    made = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda *args, **kw: made.append(Writer(*args, **kw)) or made[-1]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with StepLog(None, tmp_path / "board", 3) as log:
        log.write({"step": 3, "meta_loss": 0.5, "diverged_tasks": [{"task": 0}]}, 2.0)
    (writer,) = made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "board"), 3, True)
    assert writer.seen == [("meta_loss", 0.5, 3), ("seconds", 2.0, 3)]


def test_real_event_files(noisy, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(noisy(), W, outer=SGD, num_steps=3, tensorboard=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("meta_loss")
    assert [e.step for e in events] == [0, 1, 2]
    assert [e.value for e in events] == pytest.approx([m["meta_loss"] for m in result.history])
