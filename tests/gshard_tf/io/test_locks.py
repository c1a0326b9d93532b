"""Who may write to a folder: one process, until it ends, and no child of it."""

import errno
import fcntl
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from processes import forked, left_by_a_killed_process

from gshard_tf.io.atomic_folders import new_folder
from gshard_tf.io.locks import AlreadyRunningError, FolderLock

BESIDE = ".run.gshard-lock"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def take(folder):
    return FolderLock(folder).real


def open_files():
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link)]


def test_one_process_has_it_and_says_which(run):
    lock = FolderLock(run)
    said = forked(take, run)
    host = os.uname().nodename
    assert said.startswith("AlreadyRunningError")
    assert f"another run, process {os.getpid()} on {host}, is writing to it" in said
    lock.release()
    lock.release()
    assert forked(take, run) == str(run)


def test_a_lock_that_another_thread_is_ending_is_waited_for(run, monkeypatch):
    """As the thread does that wrote the last checkpoint of an interrupted fit."""
    lock = FolderLock(run)
    thread = threading.Timer(0.2, lock.release)
    thread.start()
    second = FolderLock(run)
    thread.join()
    assert second.is_own and not lock.is_own
    monkeypatch.setattr("gshard_tf.io.locks._SECONDS_TO_END", 0.05)
    with pytest.raises(AlreadyRunningError, match=f"process {os.getpid()} on"):
        FolderLock(run)
    assert second.is_own and second.is_in_place


def test_a_run_that_does_not_say_who_it_is(run):
    """As those of earlier versions, which held a lock of the same file."""
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunningError, match="another run is writing"):
            FolderLock(run)
    assert not (run.parent / BESIDE).exists()


def test_a_child_of_a_killed_run_does_not_have_it(run):
    with left_by_a_killed_process(lambda: FolderLock(run)) as killed:
        assert f"process {killed} on" in (run / ".lock").read_text()
        FolderLock(run).release()


def test_a_child_of_a_killed_writer_does_not_have_its_folder(tmp_path):
    def begin():
        writing = new_folder(tmp_path / "out")
        (writing.__enter__() / "x").write_text("half")
        return writing

    with left_by_a_killed_process(begin):
        with new_folder(tmp_path / "out") as partial:
            (partial / "y").write_text("whole")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["y"]


def test_a_child_that_ends_takes_nothing_from_the_writer(tmp_path):
    writing = new_folder(tmp_path / "out")
    (writing.__enter__() / "x").write_text("1")
    assert forked(lambda: writing.__exit__(SystemExit, SystemExit(), None)) == "False"
    writing.__exit__(None, None, None)
    assert (tmp_path / "out" / "x").read_text() == "1"


@pytest.mark.parametrize("close_fds", [True, False])
def test_programs_that_were_started_do_not_have_it(run, close_fds):
    lock = FolderLock(run)
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(
        command, close_fds=close_fds, stdin=subprocess.PIPE
    ) as program:
        lock.release()
        assert forked(take, run) == str(run)
        program.communicate(b"\n")


def test_a_child_cannot_let_it_go(run):
    lock = FolderLock(run)

    def end():
        assert not lock.is_own
        lock.release()

    assert forked(end) == "None"
    assert lock.is_own and (run.parent / BESIDE).exists()
    assert "AlreadyRunningError" in forked(take, run)


def test_children_that_begin_while_it_is_being_taken(run):
    """From another thread, again and again: none has a lock that it does not know."""
    over = threading.Event()

    def take_and_let_go():
        while not over.is_set():
            FolderLock(run).release()

    thread = threading.Thread(target=take_and_let_go)
    thread.start()
    try:
        for _ in range(30):
            assert str(run.parent) not in forked(open_files)
    finally:
        over.set()
        thread.join()


def test_no_second_run_where_the_folder_was_removed(run):
    lock = FolderLock(run)
    assert lock.is_in_place
    shutil.rmtree(run)
    assert not lock.is_in_place
    run.mkdir()
    said = forked(take, run)
    assert "AlreadyRunningError" in said and f"process {os.getpid()}" in said
    assert not lock.is_in_place and lock.is_of(run)


def test_a_folder_is_the_one_that_links_lead_to(run):
    link = run.parent / "link"
    link.symlink_to("run")
    lock = FolderLock(link)
    assert lock.is_of(run) and lock.is_of(run / ".." / "run")
    for name in (run, link, run / ".." / "link"):
        assert "AlreadyRunningError" in forked(take, name)
    other = run.parent / "other"
    other.mkdir()
    link.unlink()
    link.symlink_to("other")
    # The run's name leads to a folder now that it has not locked.
    assert not lock.is_in_place


def test_what_is_left_behind(run):
    lock = FolderLock(run)
    assert (run.parent / BESIDE).exists()
    del lock
    gc.collect()
    assert not (run.parent / BESIDE).exists()
    with left_by_a_killed_process(lambda: FolderLock(run)):
        assert (run.parent / BESIDE).exists()
    FolderLock(run).release()
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_copying_the_folder_does_not_let_it_go(run):
    lock = FolderLock(run)
    shutil.copytree(run, run.parent / "copy")
    (run / ".lock").read_text()
    assert lock.is_own and "AlreadyRunningError" in forked(take, run)


def test_a_file_of_somebody_else_beside_it(run):
    """A link, a folder: nothing is done to it, and the lock within must do."""
    other = run.parent / "thesis"
    other.write_text("mine")
    (run.parent / BESIDE).symlink_to(other)
    lock = FolderLock(run)
    assert "AlreadyRunningError" in forked(take, run)
    lock.release()
    assert other.read_text() == "mine" and (run.parent / BESIDE).is_symlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("writable", [True, False])
def test_what_a_user_may_write_to(writable):
    """Not the folder above: the lock within must do. Nor the folder: a sentence."""
    with tempfile.TemporaryDirectory() as name:
        above = Path(name)
        above.chmod(0o755)
        run = above / "run"
        run.mkdir()
        run.chmod(0o777 if writable else 0o755)
        said = forked(_take_as_nobody, above, run)
    if writable:
        assert said == "['run']"
    else:
        assert f"{run} cannot be locked" in said and "Permission denied" in said


def _take_as_nobody(above, run):
    os.setuid(65534)
    try:
        lock = FolderLock(run)
    except PermissionError as error:
        assert error.errno == errno.EACCES
        return error
    return lock.is_in_place and os.listdir(above)


def test_a_disk_that_does_not_lock(run, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="disk that locks files") as caught:
        FolderLock(run)
    assert caught.value.errno == errno.ENOLCK
