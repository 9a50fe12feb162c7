"""One run at a time: living owners are named, dead ones replaced."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from tcm_fast.checkpoint import run_lock
from tcm_fast.checkpoint.run_lock import NAME, RunLock


def hold(folder, ready):
    RunLock(folder)
    ready.set()
    time.sleep(60)


def test_a_folder_in_use_is_refused_with_its_owner(tmp_path):
    lock = RunLock(tmp_path / "run")
    assert lock.replaced == ""
    with pytest.raises(FileExistsError, match=rf"in use by process {os.getpid()} on .* last sign"):
        RunLock(tmp_path / "run")
    lock.release()
    lock.release()
    assert not (tmp_path / "run" / NAME).exists()
    RunLock(tmp_path / "run").release()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(FileExistsError, match=f"in use by process {process.pid} on"):
        RunLock(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lock = RunLock(tmp_path)
    assert f"process {process.pid} on" in lock.replaced
    lock.release()


def write_owner(folder, silence, **changes):
    """A lock file without the system's lock, as another machine's run leaves it."""
    owner = {"host": "elsewhere", "pid": 1, "begun": "1", "since": time.time() - 7200} | changes
    (folder / NAME).write_text(json.dumps(owner))
    os.utime(folder / NAME, (time.time() - silence,) * 2)


def test_another_machine_counts_as_gone_after_a_silence(tmp_path):
    write_owner(tmp_path, silence=60)
    with pytest.raises(
        FileExistsError, match=r"process 1 on elsewhere, there for 2.0 h, last sign"
    ):
        RunLock(tmp_path)
    write_owner(tmp_path, silence=run_lock.STALE + 60)
    lock = RunLock(tmp_path)
    assert "process 1 on elsewhere" in lock.replaced
    lock.release()


@pytest.mark.parametrize("content", ["", "nonsense", "[1]"])
def test_a_lock_that_says_nothing_is_free(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    RunLock(tmp_path).release()


def test_without_the_systems_locks_the_owner_is_looked_up(tmp_path, monkeypatch):
    class NoLocks:
        LOCK_EX, LOCK_NB = 2, 4

        @staticmethod
        def flock(*_):
            raise OSError(run_lock.errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(run_lock, "fcntl", NoLocks)
    own = {
        "host": socket.gethostname(),
        "pid": os.getppid(),
        "begun": run_lock._begun(os.getppid()),
    }
    write_owner(tmp_path, 10_000, **own)
    with pytest.raises(FileExistsError, match=f"in use by process {os.getppid()}"):
        RunLock(tmp_path)
    write_owner(tmp_path, 0, **own | {"begun": "another process of that number"})
    RunLock(tmp_path).release()


def test_a_folder_that_was_deleted_is_taken_again(tmp_path):
    lock = RunLock(tmp_path / "run")
    (tmp_path / "run" / NAME).unlink()
    (tmp_path / "run").rmdir()
    lock.hold()
    with pytest.raises(FileExistsError):
        RunLock(tmp_path / "run")
    (tmp_path / "run" / NAME).unlink()
    other = RunLock(tmp_path / "run")
    with pytest.raises(FileExistsError, match="in use by"):
        lock.hold()
    lock.release()
    other.release()


def test_it_gives_signs_of_life_and_leaves_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    threads = threading.active_count()
    lock = RunLock(tmp_path)
    os.utime(lock.path, (0, 0))
    for _ in range(500):
        if lock.path.stat().st_mtime > 1:
            break
        time.sleep(0.01)
    assert lock.path.stat().st_mtime > time.time() - 60
    lock.release()
    assert threading.active_count() == threads
