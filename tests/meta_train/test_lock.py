"""A folder belongs to one run at a time, and to none when its process is gone."""

import multiprocessing
import os
import signal

import pytest

from fmeta.meta_train._lock import locked


def hold(folder):
    """A child process that holds the lock until it is killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locked(folder):
                os.write(write, b"x")
                signal.pause()
        finally:
            os._exit(1)  # not into the tests
    os.read(read, 1)
    os.close(read)
    os.close(write)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


pytestmark = [
    pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="POSIX"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]


def test_a_second_one_is_refused_with_the_process_of_the_first(tmp_path):
    child = hold(tmp_path)
    try:
        words = rf"{tmp_path} is in use by another run \(process {child}\): wait for it"
        with pytest.raises(BlockingIOError, match=words), locked(tmp_path):
            pass
    finally:
        kill(child)


def test_a_killed_process_holds_nothing(tmp_path):
    kill(hold(tmp_path))
    assert os.listdir(tmp_path) == [".lock"]
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert os.listdir(tmp_path) == []


def test_within_one_process_too(tmp_path):
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_it_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
