"""Files are whole or as they were; errors name the file, the array and the cure."""

import errno
import json
import os

import pytest
import torch

from fmeta import _files

TREE = {"net": [torch.arange(3), torch.ones(2, 2, dtype=torch.bfloat16)], "s": torch.tensor(0.5)}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_tree_comes_back_as_it_was(tmp_path):
    _files.save_tree(tmp_path / "t.safetensors", TREE, {"who": "me"})
    got = _files.load_tree(tmp_path / "t.safetensors", TREE)
    assert isinstance(got["net"], list)
    for a, b in zip([*got["net"], got["s"]], [*TREE["net"], TREE["s"]], strict=True):
        assert torch.equal(a, b)
        assert a.dtype is b.dtype
    assert _files.read_metadata(tmp_path / "t.safetensors") == {"who": "me"}


def test_views_and_shared_storage_are_saved_by_value(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    tree = {"t": whole.t(), "row": whole[1], "same": whole, "leaf": whole.clone().requires_grad_()}
    _files.save_tree(tmp_path / "t", tree)
    got = _files.load_tree(tmp_path / "t", tree)
    assert all(torch.equal(got[k], tree[k]) for k in tree)
    assert not got["leaf"].requires_grad


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({**TREE, "more": torch.ones(1)}, r"missing \['more'\], unexpected none"),
        ({"s": TREE["s"]}, r"missing none, unexpected \['net/0', 'net/1'\]"),
        (
            {**TREE, "s": torch.ones(2)},
            r"array s has shape \(\) and dtype torch.float32, expected \(2,\)",
        ),
        ({**TREE, "s": TREE["s"].double()}, "array s .* expected .* torch.float64"),
    ],
)
def test_a_file_of_another_tree_is_named_with_its_arrays(tmp_path, like, words):
    path = tmp_path / "t.safetensors"
    _files.save_tree(path, TREE)
    with pytest.raises(ValueError, match=words) as error:
        _files.load_tree(path, like)
    assert str(path) in str(error.value)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux tells")
def test_what_was_read_does_not_hold_the_file(tmp_path):
    path = tmp_path / "t.safetensors"
    _files.save_tree(path, TREE)
    got = _files.load_tree(path, TREE)
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()
    assert torch.equal(got["net"][0], TREE["net"][0])


@pytest.mark.parametrize("content", [b"", b"no", b"x" * 1000, None], ids=repr)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "t.safetensors"
    _files.save_tree(path, TREE)
    path.write_bytes(path.read_bytes()[:-3] if content is None else content)
    with pytest.raises(ValueError, match=r"t\.safetensors is not a whole safetensors file"):
        _files.load_tree(path, TREE)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.safetensors"):
        _files.load_tree(tmp_path / "none.safetensors", TREE)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        _files.load_tree(tmp_path, TREE)


def test_writing_leaves_nothing_else_behind(tmp_path):
    _files.write_json(tmp_path / "a.json", {"x": 1})
    _files.write_json(tmp_path / "a.json", {"x": 2})
    assert names(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "a.txt"
    _files.write_text(path, "old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        _files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    _files.write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    folder = _files.writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert names(folder) == []


@pytest.mark.parametrize("below", ["", "run"])
def test_a_folder_that_cannot_be_is_named_with_the_cure(tmp_path, below):
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "file" / below
    with pytest.raises(OSError, match=r"cannot write into the folder .*file.*choose another one"):
        _files.writable_folder(folder)


def test_writing_below_a_missing_folder_names_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"cannot write .*a\.txt: there is no folder .*none"
    ):
        _files.write_text(tmp_path / "none" / "a.txt", "x")


def test_two_leaves_of_one_path_are_refused(tmp_path):
    tree = {"a/b": torch.tensor(1.0), "a": {"b": torch.tensor(0.0)}}
    with pytest.raises(ValueError, match=r"two leaves of the tree have the path a/b.*rename a key"):
        _files.save_tree(tmp_path / "x.safetensors", tree)
    assert names(tmp_path) == []
    _files.save_tree(tmp_path / "x.safetensors", {"a": {"b": torch.tensor(0.0)}})
    with pytest.raises(ValueError, match="two leaves of the tree have the path a/b"):
        _files.load_tree(tmp_path / "x.safetensors", tree)


def test_json_comes_back(tmp_path):
    _files.write_json(tmp_path / "a.json", {"x": [1, None, "é"]})
    assert _files.read_json(tmp_path / "a.json") == {"x": [1, None, "é"]}


@pytest.mark.parametrize("content", [b"", b'{"x": ', b"\xff\xfe", b"{} {}"], ids=repr)
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not a whole JSON file"):
        _files.read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.json"):
        _files.read_json(tmp_path / "none.json")


def test_a_full_disk_names_the_file_and_keeps_the_systems_number(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.txt: No space left.*unharmed") as error:
        _files.write_text(tmp_path / "a.txt", "x")
    assert error.value.errno == errno.ENOSPC


def test_only_temporary_files_of_killed_writers_are_removed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / ".lock").write_text("1")
    (tmp_path / "mine.tmp").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: None)  # as if killed before it
        _files.write_text(tmp_path / "b.txt", "half")
    assert len(names(tmp_path)) == 4
    _files.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".lock", "a.txt", "mine.tmp"]
