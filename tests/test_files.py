import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gshard_files as publishing


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_folder_appears_when_complete(tmp_path):
    with publishing.new_folder(tmp_path / "a" / "out") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    assert hidden(tmp_path / "a") == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_things_as_they_were(tmp_path, error):
    out = tmp_path / "out"
    for before in (None, "old"):
        if before:
            out.mkdir()
            (out / "x").write_text(before)
        with (
            pytest.raises(error),
            publishing.new_folder(out, replace=True) as partial,
        ):
            (partial / "x").write_text("new")
            raise error
        assert out.exists() == bool(before)
        assert hidden(tmp_path) == []
    assert (out / "x").read_text() == "old"


def test_leftovers_are_removed(tmp_path):
    stale = tmp_path / ".out.partial" / "deep"
    stale.mkdir(parents=True)
    (stale / "junk").write_text("junk")
    with publishing.new_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x"]


def test_death_between_the_two_renames_is_repaired(tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "x").write_text("old")
    with (
        pytest.raises(FileExistsError),
        publishing.new_folder(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / "x").read_text() == "old"
    assert hidden(tmp_path) == []


def test_existing_folder_is_not_replaced_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        with publishing.new_folder(tmp_path / "out"):
            pass
    with publishing.new_folder(tmp_path / "out", replace=True) as partial:
        (partial / "x").write_text("1")
    assert (tmp_path / "out" / "x").exists()


def test_two_at_once(tmp_path):
    with publishing.new_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("first")
        with pytest.raises(publishing.AlreadyRunningError, match="another process"):
            with publishing.new_folder(tmp_path / "out"):
                pass
    assert (tmp_path / "out" / "x").read_text() == "first"


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    publishing.write_file(path, b"one")
    publishing.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


def test_leftover_files_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".file.{dead.pid}.partial").write_text("half")
    alive = tmp_path / f".file.{os.getppid()}.partial"
    alive.write_text("being written")
    publishing.write_file(tmp_path / "file", b"one")
    assert sorted(os.listdir(tmp_path)) == sorted(["file", alive.name])


def test_files_have_ordinary_permissions(tmp_path):
    publishing.write_file(tmp_path / "ours", b"")
    (tmp_path / "ordinary").write_bytes(b"")
    modes = {(tmp_path / n).stat().st_mode for n in ("ours", "ordinary")}
    assert len(modes) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    really_write = publishing.write_synced
    path = tmp_path / "file"
    publishing.write_file(path, b"old")
    # /dev/full answers every write as a full disk does.
    monkeypatch.setattr(
        publishing, "write_synced", lambda p, data: really_write("/dev/full", data)
    )
    with pytest.raises(OSError, match="nothing was published") as caught:
        publishing.write_file(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
