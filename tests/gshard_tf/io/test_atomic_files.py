import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gshard_tf.io import atomic_files
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.atomic_folders import Contents, check_folder, new_folder
from gshard_tf.io.locks import AlreadyRunningError
from gshard_tf.io.paths import make_folder

THING = Contents("a thing", ("x", "parts/*", "empty"), mark="x")


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_folder_appears_when_complete(tmp_path):
    with new_folder(tmp_path / "a" / "out") as partial:
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
            new_folder(out, True, THING) as partial,
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
    with new_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x"]


def test_death_between_the_two_renames_is_repaired(tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "x").write_text("old")
    with (
        pytest.raises(FileExistsError),
        new_folder(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / "x").read_text() == "old"
    assert hidden(tmp_path) == []


def test_existing_folder_is_not_replaced_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        with new_folder(tmp_path / "out"):
            pass
    with new_folder(tmp_path / "out", replace=True) as partial:
        (partial / "x").write_text("1")
    assert (tmp_path / "out" / "x").exists()


def test_two_at_once(tmp_path):
    with new_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("first")
        with pytest.raises(AlreadyRunningError, match="another process"):
            with new_folder(tmp_path / "out"):
                pass
    assert (tmp_path / "out" / "x").read_text() == "first"


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


def test_leftover_files_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".file.{dead.pid}.partial").write_text("half")
    alive = tmp_path / f".file.{os.getppid()}.partial"
    alive.write_text("being written")
    write_file(tmp_path / "file", b"one")
    assert sorted(os.listdir(tmp_path)) == sorted(["file", alive.name])


def test_files_have_ordinary_permissions(tmp_path):
    write_file(tmp_path / "ours", b"")
    (tmp_path / "ordinary").write_bytes(b"")
    modes = {(tmp_path / n).stat().st_mode for n in ("ours", "ordinary")}
    assert len(modes) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    really_write = atomic_files.write_synced
    path = tmp_path / "file"
    write_file(path, b"old")
    # /dev/full answers every write as a full disk does.
    monkeypatch.setattr(
        atomic_files, "write_synced", lambda p, data: really_write("/dev/full", data)
    )
    with pytest.raises(OSError, match="nothing was published") as caught:
        write_file(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------- whose folder it is


def make_thing(folder, text="old"):
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "a").write_text(text)
    (folder / "empty").mkdir()
    (folder / "x").write_text(text)
    return folder


def tree(folder):
    """Everything in a folder: names, texts, where links lead to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_text() if path.is_file() else "folder"
    return found


def replace(path):
    with new_folder(path, True, THING) as partial:
        (partial / "x").write_text("new")


def refuse(path, match, error=FileExistsError):
    """Asserts that a folder is refused before the block begins."""
    with pytest.raises(error, match=match) as caught:
        with new_folder(path, True, THING):
            raise AssertionError("work was done")
    with pytest.raises(error, match=match):
        check_folder(path, True, THING)
    return str(caught.value)


def test_a_folder_of_ours_is_replaced(tmp_path):
    replace(make_thing(tmp_path / "out"))
    assert tree(tmp_path) == {"out": "folder", "out/x": "new"}


@pytest.mark.parametrize(
    "stranger", ["thesis.tex", "deep/thesis.tex", "parts/deep/thesis.tex", ".hidden"]
)
def test_a_folder_that_holds_anything_else_is_not(tmp_path, stranger):
    out = make_thing(tmp_path / "out")
    (out / stranger).parent.mkdir(parents=True, exist_ok=True)
    (out / stranger).write_text("years of work")
    before = tree(tmp_path)
    assert str(out) in refuse(out, "no part of a thing")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("missing", ["x", "all"])
def test_names_that_fit_do_not_make_it_ours(tmp_path, missing):
    out = make_thing(tmp_path / "out")
    (out / "x").unlink()
    if missing == "all":
        (out / "thesis").mkdir()
    before = tree(tmp_path)
    refuse(out, "no x|no part")
    assert tree(tmp_path) == before


def test_an_empty_folder_of_another_name_is_a_stranger(tmp_path):
    (make_thing(tmp_path / "out") / "thesis").mkdir()
    refuse(tmp_path / "out", "thesis")


def test_without_contents_only_an_empty_folder_is_replaced(tmp_path):
    out = make_thing(tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        with new_folder(out, replace=True):
            pass
    assert (out / "x").read_text() == "old"


def test_what_comes_while_it_is_written_stays(tmp_path):
    for before in (False, True):
        out = tmp_path / f"out-{before}"
        if before:
            out.mkdir()
        with pytest.raises(FileExistsError):
            with new_folder(out, True, THING) as partial:
                (partial / "x").write_text("new")
                out.mkdir(exist_ok=True)
                (out / "thesis").write_text("1")
        assert tree(out) == {"thesis": "1"}
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("spelling", [".", "", "../cwd", "absolute", ".."])
def test_the_working_folder_is_never_replaced(tmp_path, monkeypatch, spelling):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    refuse(cwd if spelling == "absolute" else spelling, "working folder")
    assert os.stat(".").st_ino == cwd.stat().st_ino
    assert hidden(tmp_path) == []


def test_neither_the_root_nor_home_is_replaced(tmp_path, monkeypatch):
    home = tmp_path / "a" / "home"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for path in (home, "~", home.parent):
        refuse(path, "home folder")
    refuse("/", "root of the disk")
    refuse("/proc", "mounted")


def test_a_file_is_not_moved_aside(tmp_path):
    (tmp_path / "out").write_text("1")
    refuse(tmp_path / "out", "no folder")
    refuse(tmp_path / "out" / "within", "no folder", NotADirectoryError)
    assert tree(tmp_path) == {"out": "1"}


def test_a_folder_to_write_to(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):
        assert make_folder("~/a/b") == tmp_path / "a" / "b"
    (tmp_path / "link").symlink_to("a")
    assert make_folder(tmp_path / "link").is_symlink()
    (tmp_path / "nowhere").symlink_to("unmounted")
    (tmp_path / "file").write_text("1")
    for name, said in (("nowhere", "link to .*unmounted"), ("file", "no folder")):
        with pytest.raises(FileExistsError, match=said):
            make_folder(tmp_path / name)
    with pytest.raises(ValueError, match="out must be on a disk"):
        make_folder("gs://a", "out")


# ----------------------------------------------------------------------- links


def test_a_link_to_a_folder_stays_one(tmp_path):
    make_thing(tmp_path / "disk" / "real")
    (tmp_path / "out").symlink_to("disk/real")
    replace(tmp_path / "out")
    assert os.readlink(tmp_path / "out") == "disk/real"
    assert tree(tmp_path / "disk") == {"real": "folder", "real/x": "new"}
    assert hidden(tmp_path) == []


def test_a_folder_behind_a_link_is_not_emptied(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "thesis").write_text("1")
    (tmp_path / "out").symlink_to("real")
    (tmp_path / "nowhere").symlink_to("unmounted/out")
    (tmp_path / "circle").symlink_to("circle")
    before = tree(tmp_path)
    refuse(tmp_path / "out", "thesis")
    refuse(tmp_path / "nowhere", "not there")
    refuse(tmp_path / "circle", "back to itself")
    assert tree(tmp_path) == before


def test_links_within_a_folder_are_strangers(tmp_path):
    out = make_thing(tmp_path / "out")
    (out / "parts" / "b").symlink_to(tmp_path)
    before = tree(out)
    refuse(out, "parts/b")
    assert tree(out) == before


@pytest.mark.parametrize("kind", ["link", "file"])
@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_hidden_names_that_are_taken(tmp_path, name, kind):
    """What a link leads to used to be emptied, and filled with ours."""
    out = make_thing(tmp_path / "out")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "thesis").write_text("1")
    if kind == "link":
        (tmp_path / name).symlink_to("real")
    else:
        (tmp_path / name).write_text("2")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=name):
        replace(out)
    assert tree(tmp_path) == before


def test_only_our_own_leftovers_are_removed(tmp_path):
    make_thing(tmp_path / "out")
    make_thing(tmp_path / ".out.replaced")
    (tmp_path / ".out.replaced" / "x").unlink()  # died while it was removed
    replace(tmp_path / "out")
    assert tree(tmp_path) == {"out": "folder", "out/x": "new"}
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "thesis").write_text("1")
    with pytest.raises(FileExistsError, match="thesis"):
        replace(tmp_path / "out")
    assert (tmp_path / ".out.replaced" / "thesis").exists()


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_text("old")
    (tmp_path / "file").symlink_to("disk/real")
    write_file(tmp_path / "file", b"new")
    (tmp_path / "fresh").symlink_to("disk/fresh")
    write_file(tmp_path / "fresh", b"new")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="back to itself"):
        write_file(tmp_path / "circle", b"new")
    assert tree(tmp_path) == {
        "circle": "circle",
        "disk": "folder",
        "disk/fresh": "new",
        "disk/real": "new",
        "file": "disk/real",
        "fresh": "disk/fresh",
    }


def own_partial(folder, name="file"):
    """The name of this thread's partial file."""
    seen = []
    write = atomic_files.write_synced

    def note(path, data):
        seen.append(path)
        write(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_files, "write_synced", note)
        write_file(folder / name, b"")
    return seen[0]


def test_partial_files_are_not_written_through_links(tmp_path):
    """Neither one that was there, nor one that is put there meanwhile."""
    partial = own_partial(tmp_path)
    (tmp_path / "victim").write_text("1")
    partial.symlink_to("victim")
    write_file(tmp_path / "file", b"new")
    assert tree(tmp_path) == {"file": "new", "victim": "1"}
    partial.symlink_to("victim")
    with pytest.raises(OSError) as caught:
        atomic_files.write_synced(partial, b"new")
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "victim").read_text() == "1"


def test_partial_files_are_opened_exclusively(tmp_path, monkeypatch):
    partial = own_partial(tmp_path)
    # As if somebody made it after the leftovers were removed.
    monkeypatch.setattr(atomic_files, "_remove_leftovers", lambda path, partial: None)
    partial.symlink_to("victim")
    with pytest.raises(FileExistsError, match="nothing was published"):
        write_file(tmp_path / "file", b"new")
    assert partial.is_symlink() and not (tmp_path / "victim").exists()


def test_partial_files_of_other_names_are_left_alone(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    others = [f".file.txt.{os.getppid()}-1.partial", f".file.{dead.pid}.txt.partial"]
    for name in others:
        (tmp_path / name).write_text("being written")
    (tmp_path / f".file.{dead.pid}-7.partial").write_text("half")
    write_file(tmp_path / "file", b"one")
    assert sorted(os.listdir(tmp_path)) == sorted(["file", *others])


# ----------------------------------------------------------------- kinds and modes


def test_a_file_replaces_nothing_but_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(FileExistsError, match=name):
            write_file(tmp_path / name, b"new")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_modes_are_kept(tmp_path):
    file = tmp_path / "file"
    for mode in (0o600, 0o664, 0o400):
        file.write_text("old") if not file.exists() else None
        file.chmod(mode)
        before = os.umask(0o077)
        try:
            write_file(file, b"new")
        finally:
            os.umask(before)
        assert stat.S_IMODE(file.stat().st_mode) == mode
    out = make_thing(tmp_path / "out")
    out.chmod(0o750)
    replace(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
